"""RULES, by name: each reads the series of a run and returns a finding, or None."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from unbraid.errors import UserError, nearest
from unbraid.health import faults, gradients, learning, outputs, throughput, validation
from unbraid.health.finding import CODES, SEVERITIES, Finding
from unbraid.health.series import Series, read_series

STATUS = {severity: status for status, severity in enumerate(reversed(SEVERITIES))}
Rule = Callable[[Series], Finding | None]

RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        faults.faults_in_a_row,
        faults.bad_files,
        faults.loss_spike,
        faults.adam_remembers,
        faults.ranks_differ,
        gradients.norm_spikes,
        gradients.clip_is_the_rate,
        gradients.learning_rate,
        gradients.first_blocks,
        gradients.loss_scale_sinks,
        learning.oscillation,
        learning.plateau,
        learning.overfitting,
        learning.easy_share,
        learning.rate_never_moved,
        learning.worse_than_mixture,
        learning.not_shuffled,
        validation.validation_not_finite,
        validation.validation_in_training,
        validation.permutation_flips,
        outputs.dead_output,
        outputs.collapsed_outputs,
        outputs.output_is_mixture,
        outputs.source_left_behind,
        outputs.foreign_targets,
        outputs.foreign_sum,
        outputs.silent_sources,
        throughput.loader_bound,
        throughput.slow_rank,
        throughput.slowing_down,
        throughput.memory_creeps,
    )
}


def examine(series: Series, *, mute: Iterable[str] = ()) -> list[Finding]:
    """What all rules find, worst first, and among equals the surest first.

    Args:
        series: The run.
        mute: Codes that are not to be told.

    Raises:
        UserError: If there is no such code.
    """
    silent = set(mute)
    for code in silent.difference(CODES):
        listed = ", ".join(CODES)
        raise UserError(
            f"{code!r} cannot be muted, as no finding has that code; there are {listed}." + nearest(code.upper(), CODES)
        )
    found = [finding for name, rule in RULES.items() if (finding := _asked(name, rule, series)) is not None]
    told = [finding for finding in found if finding.code not in silent]
    return sorted(told, key=lambda finding: (SEVERITIES.index(finding.severity), -finding.confidence))


def _asked(name: str, rule: Rule, series: Series) -> Finding | None:
    """What a rule finds; one that breaks on odd records must not hide what the others find."""
    try:
        return rule(series)
    except Exception as error:  # noqa: BLE001
        return Finding(
            code="RULE_FAILED",
            severity="note",
            what=f"The rule {name} could not be asked.",
            why=f"{type(error).__name__}: {error}.",
            advice="Look at the run's records: something in them is not as it is written by a run.",
            key="",
            steps=(0, series.last_step),
            confidence=1.0,
        )


def status(findings: Iterable[Finding]) -> int:
    """0 where nothing has to be done, 1 where there is a warning, 2 where something is critical."""
    return max((STATUS[finding.severity] for finding in findings), default=0)


def verdict(findings: Sequence[Finding]) -> str:
    """In a few words: ``healthy``, or how many findings of which kind."""
    counts = Counter[str](finding.severity for finding in findings)
    if not counts["critical"] and not counts["warning"]:
        return "healthy" + (f" ({_counted(counts['note'], 'note')})" if counts["note"] else "")
    kinds = (("critical", "critical finding"), ("warning", "warning"), ("note", "note"))
    return ", ".join(_counted(counts[kind], name) for kind, name in kinds if counts[kind])


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'s' if count != 1 else ''}"


LOOKED_BACK = 5000
"""Steps that a running training is judged by, so that a look costs no more late in a run than early."""


def bulletin(path: Path) -> str:
    """One line on a run that goes on, from its last steps and some of all; looking must never cost the run."""
    try:
        findings = examine(read_series(path, last=LOOKED_BACK, thinned=True))
    except Exception as error:  # noqa: BLE001
        return f"doctor: could not look ({type(error).__name__}: {error})"
    worst = next((finding for finding in findings if STATUS[finding.severity]), None)
    more = f": {worst.code}, {worst.what} {worst.advice}" if worst else ""
    return f"doctor: {verdict(findings)}{more}"
