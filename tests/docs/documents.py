"""The README and the pages of docs/, their code blocks and commands."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
"""Text of each document by its path, such as ``docs/data.md``."""


def blocks(text, language):
    """Code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def named_blocks(text):
    """Python and TOML blocks that begin with a file name, such as ``# my_model.py``, by that name."""
    found = {}
    for block in (*blocks(text, "python"), *blocks(text, "toml")):
        if name := re.match(r"# (\w+\.\w+)\n", block):
            found[name[1]] = block
    return found


def commands(text):
    """Command lines of the shell blocks, without their comments."""
    lines = [line.split("#")[0].strip() for block in blocks(text, "sh") for line in block.splitlines()]
    return [line for line in lines if line]


def unwrapped(name):
    """Text of a document in one line, so that a sentence can be found wherever its lines are broken."""
    return " ".join(DOCUMENTS[name].split())
