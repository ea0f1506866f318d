"""The chapter's notebook: clean in git, and it runs from top to bottom."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "learn" / "gradient-descent.ipynb"

RUN = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=150, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""
"""In a process of its own: the kernel's packages warn, and here warnings are errors."""


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_a_valid_notebook_without_outputs(notebook):
    nbformat.validate(notebook)

    assert 15 <= len(notebook.cells) <= 25
    assert [cell.id for cell in code_cells(notebook) if cell.outputs or cell.execution_count] == []


def test_every_cell_compiles(notebook):
    for cell in code_cells(notebook):
        compile(cell.source, cell.id, "exec")


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_its_separator_learns(tmp_path):
    done = tmp_path / "done.ipynb"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    words = [sys.executable, "-c", RUN, str(NOTEBOOK), str(done)]

    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)

    assert ended.returncode == 0, ended.stderr[-3000:]
    ran = nbformat.read(done, as_version=4)
    told = "".join(output.get("text", "") for cell in code_cells(ran) for output in cell.outputs)
    gains = [float(line.split()[-2]) for line in told.splitlines() if "SI-SDR improvement" in line]
    assert len(gains) == 6
    assert gains[-1] > 10
    pictures = [o for cell in code_cells(ran) for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 12
