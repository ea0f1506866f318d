"""Each rule fires on made-up records with its problem, and no rule fires on healthy ones."""

import math

import numpy as np
import pytest
import tomli_w
from made_up import Run

from unbraid.config.recipe import load_recipe
from unbraid.health.faults import ADVICE
from unbraid.health.finding import FINDING_CODES
from unbraid.health.rules import RULES, exit_code, run_rules, summary


def codes(run, **options):
    return [finding.code for finding in run_rules(run.series(), **options)]


def nonfinite(run, first, last):
    run.change(first, last, outcome="nonfinite_loss", loss=None, loss_text="nan", n_trained=0)


def sick_faults(run):
    nonfinite(run, 500, 504)


def sick_files(run):
    run.events += [{"code": "AUDIO_NONFINITE", "step": 17, "files": ["bad.wav"], "message": "NaN"}]


def sick_file_behind_faults(run):
    for step in (100, 400, 900):
        nonfinite(run, step, step)
        event = {"code": "STEP_SKIPPED_NONFINITE_LOSS", "step": step, "files": ["bad.wav", f"good-{step}.wav"]}
        run.events.append(event)


def sick_spike(run):
    run.change(1000, 1010, loss=40.0)


def sick_adam_second_moment(run):
    run.change(1990, 1990, grad_norm=3000.0, clipped_grad_norm=3000.0)


def sick_norms(run):
    for step in (1200, 1400, 1700):
        run.change(step, step, grad_norm=150.0)


def sick_clip(run):
    run.change(clipped=True, grad_norm=lambda row: 50 + row["grad_norm"])


def sick_idle_clip(run):
    run.change(clipped=False, max_norm=500.0)


def sick_rate_high(run):
    run.change_blocks(update_ratio=30.0)


def sick_rate_low(run):
    run.recipe["optim"]["lr"] = 1e-6
    run.change_blocks(update_ratio=1e-3).change(lr=1e-6)
    for row in run.validations:
        row["si_sdri"] = -0.4


def sick_vanishing(run):
    for row in run.steps:
        if "blocks" in row:
            for index in range(4):
                row["blocks"][f"blocks.{index}"]["grad_norm"] *= 10.0 ** (1.5 * index - 6)


def sick_exploding(run):
    for row in run.steps:
        if "blocks" in row:
            for index in range(4):
                row["blocks"][f"blocks.{index}"]["grad_norm"] *= 10.0 ** (3 - 1.5 * index)


def sick_scale(run):
    run.recipe["train"]["precision"] = "fp16"
    run.change(1, 1000, loss_scale=65536.0)
    for k in range(10):
        run.change(1001 + 50 * k, None, loss_scale=65536.0 / 4 ** (k + 1))
        run.change(1001 + 50 * k, 1001 + 50 * k, outcome="fp16_overflow")


def sick_oscillation(run):
    for index, row in enumerate(run.validations):
        row["loss"] = -3.0 + 2.0 * (-1) ** index


def sick_plateau(run):
    rng = np.random.default_rng(1)
    run.change(600, None, loss=lambda _: float(-2 + rng.normal(0, 1.5)))
    for row in run.validations[3:]:
        row["loss"] = -1.8


def sick_overfitting(run):
    for index, row in enumerate(run.validations[4:]):
        row["loss"] = run.validations[3]["loss"] + 0.4 * (index + 1)


def healthy_hard_examples(run):
    rng = np.random.default_rng(5)
    run.change(loss=lambda _: float(rng.normal(-2, 3) if rng.random() < 0.03 else rng.normal(-17, 2.5)))


def healthy_end_of_a_cosine(run):
    share = len(run.steps) / 10
    run.change(-int(share), None, lr=1e-7)
    for row in run.steps[-int(share) :]:
        for block in row.get("blocks", {}).values():
            block["update_ratio"] = 1e-7


def healthy_fine_tuning(run):
    run.recipe["optim"]["lr"] = 1e-6
    run.change_blocks(update_ratio=1e-3).change(lr=1e-6)


def healthy_silent_stem(run):
    run.change(si_sdr=lambda row: [row["si_sdr"][0], None])


def healthy_stem_that_starts_late(run):
    run.change(1, 200, si_sdr=lambda row: [row["si_sdr"][0], None])


def healthy_large_batches(run):
    rng = np.random.default_rng(6)
    run.change(loss=lambda row: float(1 - 4 * np.log10(1 + row["step"] / 100) + rng.normal(0, 0.2)))


def healthy_custom_loss(run):
    run.recipe["loss"]["name"] = "my_file:my_loss"


def healthy_small_loss(run):
    run.recipe["loss"]["name"] = "l1"
    run.change(loss=lambda row: 0.01 * 10 ** (row["loss"] / 20))
    for row in run.validations:
        row["loss"] = 0.01 * 10 ** (row["loss"] / 20)


def healthy_wait_for_a_validation(run):
    run.recipe["validate"] = {"every_steps": 5000}
    run.validations.clear()
    run.change(lr=1e-3)


def healthy_noise_of_validation(run):
    rng = np.random.default_rng(7)
    for row in run.validations:
        row["loss"] += float(rng.normal(0, 0.4))


def healthy_slower_machine(run):
    run.change(1400, None, seconds=0.2)


def healthy_noise_in_every_example(run):
    for item in (item for row in run.steps for item in row.get("items", ())):
        item["item"]["files"].append("babble.wav")
    for step in (100, 400):
        nonfinite(run, step, step)
        files = [f"a-{step}.wav", f"b-{step}.wav", "babble.wav"]
        run.events.append({"code": "STEP_SKIPPED_NONFINITE_LOSS", "step": step, "files": files})


def healthy_frozen_block(run):
    for row in run.steps:
        if "blocks" in row:
            row["blocks"]["blocks.0"] = {"grad_norm": 0.0, "update_ratio": 0.0}


def healthy_but_unscored(run):
    for row in run.validations:
        row.update(loss=None, si_sdr=None, si_sdri=None)


def sick_filtered(run):
    run.change(n_filtered=3, n_trained=1)


def sick_schedule(run):
    sick_plateau(run)
    run.change(lr=1e-3)


def sick_unvalidated(run):
    run.recipe["validate"] = {"every_steps": 0}
    run.validations.clear()
    run.change(lr=1e-3)


def sick_validation(run):
    for row in run.validations:
        row["si_sdri"] = -3.0


def sick_order(run):
    run.change(loss=lambda row: row["loss"] + 8 * math.sin(row["step"] / 4))


def sick_output(run):
    run.change_items(estimate_levels_db=[-25.0, -200.0])


def sick_similarity(run):
    run.change_items(similarity=0.9999)


def sick_separation(run):
    for row in run.validations:
        row["si_sdri"] = 0.05


def sick_source(run):
    run.change(si_sdr=lambda row: [row["si_sdr"][0] + 3, -9.0])


def sick_targets(run):
    run.change(si_sdr=[-31.0, -28.0], loss=29.5)


def sick_sum(run):
    run.change_items(source_residual_db=-19.0)


def sick_silence(run):
    run.change_items(source_levels_db=[-24.0, -200.0])


def sick_loader(run):
    run.change(data_seconds=0.2)


def sick_rank(run):
    run.events.append({"code": "SLOW_RANK", "step": 300, "rank": 1, "message": "Its data takes 3 times as long."})


def sick_pace(run):
    run.change(seconds=lambda row: 0.1 + row["step"] * 1e-4)


def sick_memory(run):
    run.change(peak_memory_bytes=lambda row: 2**30 + row["step"] * 2**19)


def sick_host_memory(run):
    run.change(host_memory_bytes=lambda row: 2**30 + row["step"] * 2**19)


def sick_flips(run):
    for row in run.validations[3:]:
        row["si_sdri"] = 3.0
    run.add_items(np.random.default_rng(8), lambda _: 0.45)


def healthy_flips_while_it_learns(run):
    run.add_items(np.random.default_rng(8), lambda _: 0.45)


def healthy_flips_at_the_end_of_a_schedule(run):
    sick_flips(run)
    for row in run.validations[4:]:
        row["lr"] = 1e-4


def healthy_unseparated_items(run):
    sick_flips(run)
    for row in run.validations:
        row["item_si_sdri"] = [score if score > 3.5 else 0.4 for score in row["item_si_sdri"]]
    first = run.validations[0]["orders"]
    for row in run.validations:
        pairs = zip(row["item_si_sdri"], first, row["orders"], strict=True)
        row["orders"] = [settled if score > 1 else order for score, settled, order in pairs]


def healthy_closed_set_of_speakers(run):
    run.data["shared"] |= {"n_speakers": 4, "speakers": ["a", "b", "c", "d"]}


def healthy_run_without_environment_and_data(run):
    run.environment, run.data = {}, {}
    for row in run.validations:
        del row["orders"], row["item_si_sdri"]


def healthy_fixed_assignment(run):
    run.recipe["loss"]["assign"] = "fixed"
    for row in run.validations:
        row["orders"] = []


def sick_nan_validations(run):
    for row in run.validations[-3:]:
        row.update(loss=None, loss_text="nan")


def sick_one_nan_validation(run):
    run.validations[4].update(loss=None, loss_text="inf")
    run.validations[4]["item_si_sdri"][7] = None


def sick_split(run):
    run.data["shared"] |= {"n_files": 5, "files": ["a/0.wav"], "n_speakers": 2}


def sick_copies(run):
    run.data["shared"] |= {"n_copies": 3, "copies": [["a/0.wav", "b/other.wav"]]}


def sick_ranks(run):
    event = {"code": "RANKS_DIFFER", "step": 300, "rank": 0, "message": "They differ.", "evidence": {"first": "a.b"}}
    run.events.append(event)


SICK = {
    "CONSECUTIVE_FAULTS": [sick_faults],
    "BAD_FILES": [sick_files, sick_file_behind_faults],
    "LOSS_SPIKE": [sick_spike],
    "ADAM_SECOND_MOMENT": [sick_adam_second_moment],
    "NORM_SPIKES": [sick_norms],
    "MOST_STEPS_CLIPPED": [sick_clip],
    "CLIPPING_INACTIVE": [sick_idle_clip],
    "LR_TOO_HIGH": [sick_rate_high],
    "LR_TOO_LOW": [sick_rate_low],
    "GRADIENTS_VANISH": [sick_vanishing],
    "GRADIENTS_EXPLODE": [sick_exploding],
    "LOSS_SCALE_FALLING": [sick_scale],
    "OSCILLATION": [sick_oscillation],
    "PLATEAU": [sick_plateau],
    "OVERFITTING": [sick_overfitting],
    "MOSTLY_FILTERED": [sick_filtered],
    "LR_NEVER_REDUCED": [sick_schedule, sick_unvalidated],
    "WORSE_THAN_MIXTURE": [sick_validation],
    "NOT_SHUFFLED": [sick_order],
    "DEAD_OUTPUT": [sick_output],
    "IDENTICAL_OUTPUTS": [sick_similarity],
    "OUTPUT_IS_MIXTURE": [sick_separation],
    "SOURCE_NOT_LEARNED": [sick_source],
    "TARGETS_UNRELATED": [sick_targets],
    "SOURCES_DO_NOT_SUM": [sick_sum],
    "SILENT_SOURCES": [sick_silence],
    "LOADER_BOUND": [sick_loader],
    "SLOW_RANK": [sick_rank],
    "SLOWING_DOWN": [sick_pace],
    "MEMORY_GROWS": [sick_memory, sick_host_memory],
    "PERMUTATION_FLIPS": [sick_flips],
    "VALIDATION_NOT_FINITE": [sick_nan_validations, sick_one_nan_validation],
    "VALIDATION_IN_TRAINING": [sick_split, sick_copies],
    "RANKS_DIFFER": [sick_ranks],
}


NEEDS_FIRST_STEPS = {
    "TARGETS_UNRELATED",
    "MEMORY_GROWS",
    "OVERFITTING",
    "PLATEAU",
    "LR_NEVER_REDUCED",
    "SLOWING_DOWN",
    "SOURCE_NOT_LEARNED",
}
"""Findings that need the first steps of a run."""


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_has_no_findings(seed):
    assert codes(Run(seed=seed)) == []


HEALTHY = [make for name, make in list(globals().items()) if name.startswith("healthy_")]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", HEALTHY)
def test_an_unusual_but_healthy_run_has_no_findings(make, seed):
    run = Run(seed=seed)
    make(run)

    assert codes(run) == []


def test_rules_that_need_the_first_steps_are_silent_without_them():
    run = Run(6000, every=500)
    run.change(3001, None, seconds=0.3)
    run.steps = run.steps[-2000:]
    for row in run.validations[4:]:
        row["loss"] = run.validations[3]["loss"]

    assert codes(run) == []


def test_faults_without_a_file_are_blamed_on_the_learning_rate():
    weights, file = Run(300), Run(300)
    for run in (weights, file):
        nonfinite(run, 281, 300)
        run.events += [{"code": "STEP_SKIPPED_NONFINITE_LOSS", "step": k, "files": []} for k in range(281, 301)]
    file.events[-1]["files"] = ["bad.wav"]

    keys = [next(f.key for f in run_rules(run.series()) if f.code == "CONSECUTIVE_FAULTS") for run in (weights, file)]

    assert keys == ["optim.lr", "data.exclude"]


def test_damaged_records_neither_hide_findings_nor_raise(monkeypatch):
    run = Run()
    sick_output(run)
    run.events += [{"code": "SLOW_RANK", "step": None}, {"code": "STEP_RESCUED"}]
    run.steps.append({"outcome": "trained"})
    run.steps[99]["items"][0]["estimate_levels_db"] = [-20.0]
    run.steps[149]["blocks"]["decoder"] = None
    run.recipe["clip"] = "fixed"
    assert codes(run)[0] == "DEAD_OUTPUT"

    monkeypatch.setitem(RULES, "loader_bound", lambda _series: 1 / 0)
    assert codes(run) == ["DEAD_OUTPUT", "RULE_FAILED"]


@pytest.mark.parametrize("n_steps", [1, 5, 30, 120, 500, 999])
def test_a_healthy_run_of_few_steps_has_no_findings(n_steps):
    assert codes(Run(n_steps)) == []


@pytest.mark.parametrize(("code", "damage"), [(code, one) for code, several in SICK.items() for one in several])
def test_each_problem_is_found(code, damage):
    run = Run()
    damage(run)

    found = {finding.code: finding for finding in run_rules(run.series())}

    assert code in found
    finding = found[code]
    assert 1 <= finding.steps[0] <= finding.steps[1]
    assert 0 < finding.confidence <= 1
    assert all(text.endswith(".") and "nan" not in text for text in (finding.problem, finding.evidence, finding.advice))
    assert code not in codes(run, mute=[code])


def test_every_finding_code_has_a_made_up_run():
    assert {*SICK, "RULE_FAILED"} == set(FINDING_CODES)


EXAMPLE_VALUES = {
    "clip.max_norm": "12",
    "clip.name": "autoclip",
    "data.excerpt_seconds": "2.0",
    "data.exclude": "['a.wav']",
    "data.name": "speakers",
    "data.path": "a",
    "data.seed": "1",
    "data.workers": "4",
    "filter": "[]",
    "loss.assign": "permutation",
    "loss.name": "neg_snr",
    "optim.lr": "1e-4",
    "schedule.patience": "1",
    "train.precision": "bf16",
    "validate.every_steps": "500",
}


@pytest.mark.parametrize(("code", "damage"), [(code, one) for code, several in SICK.items() for one in several])
def test_the_key_of_a_finding_can_be_set_in_a_recipe(code, damage, tmp_path):
    run = Run()
    damage(run)
    tables = {"data": {"path": "x"}, "train": {"max_steps": 9}, "model": {"name": "conv_tasnet"}}
    for name, table in run.recipe.items():
        tables[name] = tables.get(name, {}) | table
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tables))

    findings = run_rules(run.series())

    assert code in {finding.code for finding in findings}
    for key in {finding.key for finding in findings if finding.key} | {advice.key for advice in ADVICE.values()}:
        load_recipe(tmp_path / "recipe.toml", [f"{key}={EXAMPLE_VALUES[key]}"])


def test_every_rule_fires_on_a_made_up_run():
    fired = set()
    for several in SICK.values():
        for damage in several:
            run = Run()
            damage(run)
            series = run.series()
            fired |= {name for name, rule in RULES.items() if rule(series) is not None}

    assert fired == set(RULES)


def test_runs_that_are_empty_faulty_or_without_numbers_do_not_raise():
    empty, faulty = Run(0), Run(60)
    nonfinite(faulty, 1, 60)
    without_numbers = Run(1200)
    without_numbers.steps = [{"step": row["step"], "outcome": "trained"} for row in without_numbers.steps]

    assert codes(empty) == []
    assert codes(faulty) == ["CONSECUTIVE_FAULTS"]
    assert codes(without_numbers) == []


def test_the_finding_says_if_a_spike_recovered():
    back, gone, open_end, past = Run(), Run(), Run(), Run(4000)
    back.change(1000, 1010, loss=40.0)
    gone.change(1000, None, loss=40.0)
    open_end.change(1990, None, loss=40.0)
    past.change(1000, 1010, loss=40.0)

    spikes = [
        next(f for f in run_rules(run.series()) if f.code == "LOSS_SPIKE") for run in (back, gone, open_end, past)
    ]

    assert [spike.severity for spike in spikes] == ["warning", "critical", "warning", "note"]
    assert ["It recovered" in spike.problem for spike in spikes] == [True, False, False, True]
    assert "too early to tell" in spikes[2].problem


def test_the_duration_for_adam_is_that_of_its_second_moment():
    run = Run(4000, seed=1)
    run.change(clipped_grad_norm=1.0)
    run.change(600, 600, clipped_grad_norm=100.0)
    square, seen = 1.0, []
    for row in run.steps:
        square = 0.999 * square + 0.001 * row["clipped_grad_norm"] ** 2
        seen.append(square)
    hidden = sum(value > 2 for value in seen)  # as long as the spike's square is more than the usual one

    (finding,) = [f for f in run_rules(run.series()) if f.code == "ADAM_SECOND_MOMENT"]

    assert finding.steps[0] == 600
    assert finding.steps[1] - finding.steps[0] == pytest.approx(hidden, abs=15)
    assert f"{math.sqrt(max(seen)):.1f} times as short" in finding.problem


def test_findings_are_sorted_by_severity_and_the_worst_sets_the_exit_code():
    run = Run()
    sick_output(run)
    sick_loader(run)
    sick_idle_clip(run)
    findings = run_rules(run.series())

    assert [finding.code for finding in findings] == ["DEAD_OUTPUT", "LOADER_BOUND", "CLIPPING_INACTIVE"]
    assert [exit_code(findings), exit_code(findings[1:]), exit_code(findings[2:]), exit_code([])] == [2, 1, 0, 0]
    assert summary(findings) == "1 critical finding, 1 warning, 1 note"
    assert summary(findings[2:]) == "healthy (1 note)"
    assert summary([]) == "healthy"
