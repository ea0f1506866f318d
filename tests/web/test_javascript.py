"""JavaScript and CSS of the page: formatted, free of undeclared names, and in agreement with the Python code."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from unbraid.records import OUTCOMES
from unbraid.web.payloads import VALIDATION_COLUMNS, WITH_RANGE
from unbraid.web.server import STATIC
from unbraid.web.step_columns import COLUMNS, STEP_FLAGS

ROOT = Path(__file__).parents[2]
BIOME = ROOT / "node_modules" / ".bin" / "biome"


def test_biome_finds_no_fault():
    if not BIOME.exists():
        reason = "Biome is not installed. Run npm ci (make test does) to check the JavaScript."
        if os.environ.get("CI") and shutil.which("npm"):
            pytest.fail(reason)
        pytest.skip(reason)

    result = subprocess.run(
        [BIOME, "ci", "--error-on-warnings", "--colors=off"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stdout + result.stderr


def test_charts_draw_columns_that_exist():
    source = (STATIC / "charts.js").read_text()

    assert set(re.findall(r'column: "(\w+)"', source)) <= set(COLUMNS)
    assert set(re.findall(r'column: "(\w+)",[^}]*range: true', source)) == set(WITH_RANGE)
    assert set(re.findall(r'validation: "(\w+)"', source)) <= set(VALIDATION_COLUMNS)
    assert set(re.findall(r"series\.mean\.(\w+)", source)) <= set(COLUMNS)


def test_every_outcome_has_a_text_and_a_colour():
    source = (STATIC / "labels.js").read_text()

    labelled = re.findall(r'^  (\w+): \{ text: "[^"]+", colour: "#[0-9a-f]{6}" \},$', source, re.MULTILINE)

    assert sorted(labelled) == sorted(STEP_FLAGS)
    assert set(labelled) - {"rescued"} == set(OUTCOMES) - {"trained"}
