"""What a rule of the doctor comes to: what is wrong, on which evidence, and what to do."""

from dataclasses import dataclass
from typing import Literal, get_args

Severity = Literal["critical", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "note")
"""Worst first: the run learns nothing or is about to break; it learns less than it could; it is good to know."""


Code = Literal[
    "ADAM_REMEMBERS",
    "BAD_FILES",
    "CLIP_IDLE",
    "CLIP_IS_THE_RATE",
    "DEAD_OUTPUT",
    "FAULTS_IN_A_ROW",
    "FOREIGN_SUM",
    "FOREIGN_TARGETS",
    "GRADIENTS_EXPLODE",
    "GRADIENTS_VANISH",
    "LOADER_BOUND",
    "LOSS_SCALE_SINKS",
    "LOSS_SPIKE",
    "LR_TOO_HIGH",
    "LR_TOO_LOW",
    "MEMORY_CREEPS",
    "MOSTLY_FILTERED",
    "NORM_SPIKES",
    "NOT_SHUFFLED",
    "OSCILLATION",
    "OUTPUTS_ALIKE",
    "OUTPUT_IS_MIXTURE",
    "OVERFITTING",
    "PERMUTATION_FLIPS",
    "PLATEAU",
    "RANKS_DIFFER",
    "RATE_NEVER_MOVED",
    "RULE_FAILED",
    "SILENT_SOURCES",
    "SLOWING_DOWN",
    "SLOW_RANK",
    "SOURCE_LEFT_BEHIND",
    "VALIDATION_IN_TRAINING",
    "VALIDATION_NOT_FINITE",
    "WORSE_THAN_MIXTURE",
]
CODES: tuple[Code, ...] = get_args(Code)
"""What a finding can be called, so that it can be muted; the type checker holds every rule to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        code: Stable, one of `CODES`.
        severity: ``critical``, ``warning`` or ``note``.
        what: One sentence: what is wrong.
        why: One sentence: the figures that show it.
        advice: One sentence: what to do.
        key: The recipe's key that it is done with, such as ``optim.lr``; empty where none is.
        steps: The first and the last of those it speaks of.
        confidence: How sure it is, from 0 to 1.
    """

    code: Code
    severity: Severity
    what: str
    why: str
    advice: str
    key: str
    steps: tuple[int, int]
    confidence: float
