"""RULES by name: each reads the series of a run and returns a finding, or None. The doctor runs them all."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from unbraid.errors import UserError, nearest
from unbraid.health import faults, gradients, learning, outputs, throughput, validation
from unbraid.health.finding import FINDING_CODES, SEVERITIES, Finding, Severity
from unbraid.health.series import Series, read_series

Rule = Callable[[Series], Finding | None]

RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        faults.consecutive_faults,
        faults.bad_files,
        faults.loss_spike,
        faults.adam_second_moment,
        faults.ranks_differ,
        gradients.norm_spikes,
        gradients.clipping,
        gradients.learning_rate,
        gradients.vanishing_or_exploding,
        gradients.loss_scale_falling,
        learning.oscillation,
        learning.plateau,
        learning.overfitting,
        learning.mostly_filtered,
        learning.lr_never_reduced,
        learning.worse_than_mixture,
        learning.not_shuffled,
        validation.validation_not_finite,
        validation.validation_in_training,
        validation.permutation_flips,
        outputs.dead_output,
        outputs.identical_outputs,
        outputs.output_is_mixture,
        outputs.source_not_learned,
        outputs.targets_unrelated,
        outputs.sources_do_not_sum,
        outputs.silent_sources,
        throughput.loader_bound,
        throughput.slow_rank,
        throughput.slowing_down,
        throughput.memory_grows,
    )
}

EXIT_CODES: dict[Severity, int] = {"critical": 2, "warning": 1, "note": 0}

RECENT_STEPS = 5000
"""Steps that the doctor reads during training, so that a check late in a run is as fast as an early one."""


def run_rules(series: Series, *, mute: Iterable[str] = ()) -> list[Finding]:
    """Return the findings of all rules, the most severe first, and among equals the most confident first.

    Args:
        series: The run.
        mute: Codes of findings to drop.

    Raises:
        UserError: If a muted code does not exist.
    """
    muted = set(mute)
    for code in muted.difference(FINDING_CODES):
        raise UserError(
            f"{code!r} cannot be muted: no finding has that code. Choose from {', '.join(FINDING_CODES)}."
            + nearest(code.upper(), FINDING_CODES)
        )
    findings = []
    for name, rule in RULES.items():
        finding = _run_rule(name, rule, series)
        if finding is not None and finding.code not in muted:
            findings.append(finding)
    return sorted(findings, key=lambda finding: (SEVERITIES.index(finding.severity), -finding.confidence))


def _run_rule(name: str, rule: Rule, series: Series) -> Finding | None:
    # Records may be damaged in any way. A rule that breaks on them must not hide what the other rules find.
    try:
        return rule(series)
    except Exception as error:  # noqa: BLE001
        return Finding(
            code="RULE_FAILED",
            severity="note",
            problem=f"The rule {name} could not be checked.",
            evidence=f"{type(error).__name__}: {error}.",
            advice="Look at the run's records: something in them differs from what a run writes.",
            key="",
            steps=(0, series.last_step),
            confidence=1.0,
        )


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 2 if a finding is critical, 1 if one is a warning, else 0."""
    return max((EXIT_CODES[finding.severity] for finding in findings), default=0)


def summary(findings: Sequence[Finding]) -> str:
    """Return ``healthy``, or the number of findings of each severity."""
    counts = Counter[str](finding.severity for finding in findings)
    if not counts["critical"] and not counts["warning"]:
        return "healthy" + (f" ({_count(counts['note'], 'note')})" if counts["note"] else "")
    kinds = (("critical", "critical finding"), ("warning", "warning"), ("note", "note"))
    return ", ".join(_count(counts[kind], name) for kind, name in kinds if counts[kind])


def _count(count: int, name: str) -> str:
    return f"{count} {name}{'s' if count != 1 else ''}"


def doctor_line(path: Path) -> str:
    """Return one line about a run in progress, from its recent steps and a sample of the earlier ones."""
    # The doctor must never end the training that it watches, whatever the records contain.
    try:
        findings = run_rules(read_series(path, last=RECENT_STEPS, thinned=True))
    except Exception as error:  # noqa: BLE001
        return f"doctor: could not check the run ({type(error).__name__}: {error})"
    worst = next((finding for finding in findings if finding.severity != "note"), None)
    details = f": {worst.code}, {worst.problem} {worst.advice}" if worst else ""
    return f"doctor: {summary(findings)}{details}"
