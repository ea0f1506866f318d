"""The chapter's notebook has no outputs in git, and runs from top to bottom."""

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
"""Runs in another process: the kernel's packages raise warnings, which are errors in this one."""


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_notebook_is_valid_and_has_no_outputs(notebook):
    nbformat.validate(notebook)

    assert 15 <= len(notebook.cells) <= 25
    assert [cell.id for cell in code_cells(notebook) if cell.outputs or cell.execution_count] == []


def test_every_cell_compiles(notebook):
    for cell in code_cells(notebook):
        compile(cell.source, cell.id, "exec")


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom_and_its_separator_learns(tmp_path):
    executed_path = tmp_path / "executed.ipynb"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-c", RUN, str(NOTEBOOK), str(executed_path)]

    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    assert result.returncode == 0, result.stderr[-3000:]
    outputs = [output for cell in code_cells(nbformat.read(executed_path, as_version=4)) for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    improvements_db = [float(line.split()[-2]) for line in printed.splitlines() if "SI-SDR improvement" in line]
    assert len(improvements_db) == 6
    assert improvements_db[-1] > 10
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 12
