"""Create .venv and install unbraid into it, with PyTorch's CPU build where there is no NVIDIA GPU.

The file itself runs on any Python 3, so that an old one gets a message and no syntax error.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if platform.system() == "Windows" else "bin/python")
TORCH = "torch>=2.11"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main():
    """Do the parts of the setup that have not been done yet."""
    if sys.version_info < (3, 11):
        sys.exit(
            "unbraid needs Python 3.11 or newer; this is %s. Try: make PYTHON=python3.12" % platform.python_version()
        )
    if not PYTHON.exists():
        make_venv()
    if not run(PYTHON, "-c", "import torch", quiet=True):
        install_torch()
    print("setup: installing unbraid and its tools", flush=True)
    # uv is much faster than pip, and pip is always there: try uv first.
    uv = shutil.which("uv")
    packages = ("-e", "%s[demo,dev,docs]" % ROOT)
    if not (uv and run(uv, "pip", "install", "--quiet", "--python", PYTHON, *packages)) and not pip(*packages):
        sys.exit("setup: the packages in pyproject.toml could not be installed; see the output of pip above.")
    (VENV / ".ready").touch()


def make_venv():
    """Create an empty environment with pip."""
    print("setup: creating %s" % VENV, flush=True)
    uv = shutil.which("uv")
    if run(sys.executable, "-m", "venv", VENV):
        return
    if not (uv and run(uv, "venv", "--quiet", "--seed", "--clear", "--python", sys.executable, VENV)):
        sys.exit("setup: the environment could not be created; on Debian and Ubuntu, install python3-venv first.")


def install_torch():
    """Install a CPU wheel from the disk, or else the build for this machine: CUDA only where there is a GPU."""
    print("setup: installing PyTorch", flush=True)
    gpu = bool(shutil.which("nvidia-smi")) and run("nvidia-smi", quiet=True)
    uv = shutil.which("uv")
    if not gpu and pip("--no-index", "--no-deps", TORCH, quiet=True):
        return
    if uv and run(uv, "pip", "install", "--quiet", "--python", PYTHON, "--torch-backend", "auto", TORCH):
        return
    index = () if gpu or platform.system() != "Linux" else ("--index-url", CPU_INDEX)
    if not pip(*index, TORCH):
        sys.exit("setup: PyTorch could not be installed; see pytorch.org for the build for this machine.")


def pip(*arguments, quiet=False):
    """Install packages with the environment's own pip; return True if that worked."""
    return run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments, quiet=quiet)


def run(*command, quiet=False):
    """Run a command, and return True if it succeeded."""
    sink = subprocess.DEVNULL if quiet else None
    return subprocess.run([str(part) for part in command], stdout=sink, stderr=sink, check=False).returncode == 0


if __name__ == "__main__":
    main()
