"""What a rule of the doctor comes to: what is wrong, on which evidence, and what to do."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["critical", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "note")
"""Worst first: the run learns nothing or is about to break; it learns less than it could; it is good to know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        code: Stable, such as ``LR_TOO_HIGH``.
        severity: ``critical``, ``warning`` or ``note``.
        what: One sentence: what is wrong.
        why: One sentence: the figures that show it.
        advice: One sentence: what to do.
        key: The recipe's key that it is done with, such as ``optim.lr``; empty where none is.
        steps: The first and the last of those it speaks of.
        confidence: How sure it is, from 0 to 1.
    """

    code: str
    severity: Severity
    what: str
    why: str
    advice: str
    key: str
    steps: tuple[int, int]
    confidence: float
