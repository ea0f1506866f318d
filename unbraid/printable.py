"""Print lines that may hold names from outside, such as file names: nothing in them can control the terminal."""

import sys
import unicodedata
from typing import TextIO

DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They make a name read backwards. Other invisible characters, such as joiners, are part of some scripts."""


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print each line after `printable`, and flush; ``file`` is standard output unless given."""
    for line in lines:
        print(printable(line), file=file or sys.stdout, flush=True)


def printable(text: str) -> str:
    r"""Return a text with everything escaped that a terminal would not show as itself, such as ``\x1b``.

    Escaped are control characters (a line break would make a file name look like a line of ours), marks that reverse
    the direction of writing, and bytes of file names that are not UTF-8.
    """
    return "".join(_escape(character) if _is_unsafe(character) else character for character in text)


def _is_unsafe(character: str) -> bool:
    # Cc: control; Cs: surrogates, Python's stand-ins for undecodable bytes; Zl, Zp: line and paragraph separators.
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in DIRECTION_MARKS


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that os.fsdecode could not decode
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
