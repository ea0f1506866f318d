import os
import subprocess
import sys

import pytest

from unbraid.errors import CheckpointError
from unbraid.run_directory import RunDirectory, run_directory_lock


def test_a_second_lock_is_refused_and_names_the_process_that_holds_the_first(tmp_path):
    with (
        run_directory_lock(RunDirectory(tmp_path)),
        pytest.raises(CheckpointError, match=f"process {os.getpid()}"),
        run_directory_lock(RunDirectory(tmp_path)),
    ):
        pytest.fail("two locks at once")


def test_the_lock_is_refused_to_a_second_process(tmp_path):
    code = (
        "import sys, pathlib, unbraid.run_directory as r\n"
        "with r.run_directory_lock(r.RunDirectory(pathlib.Path(sys.argv[1]))): pass"
    )

    with run_directory_lock(RunDirectory(tmp_path)):
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert f"process {os.getpid()}" in done.stderr


def test_an_error_in_the_block_releases_the_lock(tmp_path):
    run = RunDirectory(tmp_path / "new")
    with pytest.raises(KeyError), run_directory_lock(run):
        raise KeyError

    with run_directory_lock(run):
        assert run.lock.exists()


def test_killing_the_process_releases_the_lock(tmp_path):
    code = (
        "import os, sys, pathlib, unbraid.run_directory as r\n"
        "with r.run_directory_lock(r.RunDirectory(pathlib.Path(sys.argv[1]))): os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert done.returncode == -9

    with run_directory_lock(RunDirectory(tmp_path)):
        assert (tmp_path / "lock").read_text().strip() == str(os.getpid())
