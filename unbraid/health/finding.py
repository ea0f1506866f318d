"""Finding: one problem that a rule of the doctor has found, with its evidence and what to do about it."""

from dataclasses import dataclass
from typing import Literal, get_args

Severity = Literal["critical", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""Worst first: the run learns nothing or is about to fail; it learns less than it could; it is worth knowing."""

FindingCode = Literal[
    "ADAM_SECOND_MOMENT",
    "BAD_FILES",
    "CLIPPING_INACTIVE",
    "CONSECUTIVE_FAULTS",
    "DEAD_OUTPUT",
    "GRADIENTS_EXPLODE",
    "GRADIENTS_VANISH",
    "IDENTICAL_OUTPUTS",
    "LOADER_BOUND",
    "LOSS_SCALE_FALLING",
    "LOSS_SPIKE",
    "LR_NEVER_REDUCED",
    "LR_TOO_HIGH",
    "LR_TOO_LOW",
    "MEMORY_GROWS",
    "MOSTLY_FILTERED",
    "MOST_STEPS_CLIPPED",
    "NORM_SPIKES",
    "NOT_SHUFFLED",
    "OSCILLATION",
    "OUTPUT_IS_MIXTURE",
    "OVERFITTING",
    "PERMUTATION_FLIPS",
    "PLATEAU",
    "RANKS_DIFFER",
    "RULE_FAILED",
    "SILENT_SOURCES",
    "SLOWING_DOWN",
    "SLOW_RANK",
    "SOURCES_DO_NOT_SUM",
    "SOURCE_NOT_LEARNED",
    "TARGETS_UNRELATED",
    "VALIDATION_IN_TRAINING",
    "VALIDATION_NOT_FINITE",
    "WORSE_THAN_MIXTURE",
]
FINDING_CODES: tuple[FindingCode, ...] = get_args(FindingCode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One problem in a run.

    Attributes:
        code: One of `FINDING_CODES`; stable, so that it can be muted and used in scripts.
        severity: ``critical``, ``warning`` or ``note``.
        problem: One sentence: what is wrong.
        evidence: One sentence: the numbers that show it.
        advice: One sentence: what to do.
        key: The recipe key to change, such as ``optim.lr``; empty if there is none.
        steps: The first and the last step concerned.
        confidence: From 0 to 1.
    """

    code: FindingCode
    severity: Severity
    problem: str
    evidence: str
    advice: str
    key: str
    steps: tuple[int, int]
    confidence: float
