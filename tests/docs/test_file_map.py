"""The file map in CONTRIBUTING names every file and folder of the package, and none that does not exist."""

import re

from documents import DOCUMENTS, ROOT

TEXT = DOCUMENTS["CONTRIBUTING.md"]


def test_the_map_names_what_is_in_the_package():
    table = TEXT.split("| file in `unbraid/` |")[1].split("| folder |")[0]
    first_cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = {name.rstrip("/") for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}
    package = ROOT / "unbraid"
    present = {path.name for path in package.glob("*.py")}
    present |= {path.name for path in package.iterdir() if (path / "__init__.py").exists()}

    assert named == present


def test_files_it_mentions_exist():
    for name in re.findall(r"`((?:unbraid|tests|scripts|docs|benchmarks|recipes)/[\w/.]*)`", TEXT):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:train|health)/\w+\.py)`", TEXT):
        assert (ROOT / "unbraid" / name).exists(), name
