"""Reading a run directory as arrays, and the doctor command."""

import json
import subprocess
import sys

import numpy as np
import pytest
import test_rules
from made_up import Run

from unbraid import io
from unbraid.cli.main import main
from unbraid.columns import StepColumns
from unbraid.config.recipe import recipe_from_table, to_toml
from unbraid.errors import CheckpointError
from unbraid.health.rules import doctor_line, run_rules
from unbraid.health.series import DB_LOSSES, read_series
from unbraid.losses import IN_DB, LOSSES
from unbraid.schema_version import SCHEMA_VERSION


def write(run, path):
    path.mkdir()
    for name, rows in (("steps", run.steps), ("validation", run.validations), ("events", run.events)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = {"train": {}, "data": {}} | run.recipe
    tables["train"] = {"max_steps": 9} | tables["train"]
    tables["data"] = {"path": "x"} | tables["data"]
    recipe = recipe_from_table(tables, path)
    (path / "recipe.toml").write_text(to_toml(recipe))
    (path / "environment.json").write_text(json.dumps(run.environment))
    (path / "data.json").write_text(json.dumps(run.data))
    return path


def test_the_series_has_the_values_of_the_rows(tmp_path):
    run = Run(300)
    run.change(7, 7, outcome="nonfinite_loss", loss=None, loss_text="nan", si_sdr=[])
    run.change(8, 8, grad_norm=None, grad_norm_text="inf")

    series = read_series(write(run, tmp_path / "run"))

    assert len(series) == series.last_step == 300
    assert series.outcomes[6] == "nonfinite_loss"
    assert np.isnan(series.steps["loss"][6])
    assert np.isinf(series.steps["grad_norm"][7])
    assert series.si_sdr.shape == (300, 2)
    assert np.isnan(series.si_sdr[6]).all()
    assert series.sampled.grad_norms.shape == series.sampled.update_ratios.shape == (6, 6)
    assert series.validation["step"].tolist() == [200]
    assert series.validation_rows == run.validations
    assert series.data == run.data
    assert series.loss_in_db
    assert series.recipe_value("clip.name") == "fixed"
    assert series.recipe_value("clip.nothing", 3) == 3


def test_torn_lines_are_counted_and_the_last_steps_can_be_read_alone(tmp_path):
    path = write(Run(1000), tmp_path / "run")
    with (path / "steps.jsonl").open("a") as file:
        file.write('{"step": 1001, "outc')

    whole, end = read_series(path), read_series(path, last=100)

    assert (len(whole), whole.n_torn) == (1000, 1)
    assert (len(end), end.last_step, end.n_torn) == (99, 1000, 1)


def test_the_doctor_says_that_records_of_an_older_version_are_read(tmp_path, capsys):
    path = write(Run(300), tmp_path / "run")
    names = {"max_norm": "limit", "clipped_grad_norm": "norm_after", "n_filtered": "n_easy"}
    steps = path / "steps.jsonl"
    text = steps.read_text()
    for today, version_2 in names.items():
        text = text.replace(f'"{today}"', f'"{version_2}"')
    new = read_series(path)
    assert (new.schema_version, new.reading_notes) == (SCHEMA_VERSION, [])
    steps.write_text(text)

    old = read_series(path)

    assert old.schema_version == 2
    for name in names:
        assert np.array_equal(old.steps[name], new.steps[name])
    main(["doctor", str(path)])
    assert "schema version 2; they are read under the names of version 3." in capsys.readouterr().out


@pytest.mark.parametrize("file", ["recipe.toml", "environment.json", "data.json"])
@pytest.mark.parametrize("text", ["[data\n", "[]"])
def test_a_damaged_file_is_a_one_line_error(file, text, tmp_path, capsys):
    path = write(Run(60), tmp_path / "run")
    (path / file).write_text(text)

    assert main(["doctor", str(path)]) == 2
    output = capsys.readouterr().err
    assert f"{file} cannot be read" in output
    assert output.count("\n") == 1


def test_the_run_records_if_its_loss_is_in_db_and_otherwise_the_name_decides(tmp_path):
    run = Run(60)
    run.recipe["loss"]["name"] = "my_file:my_loss"
    assert run.series().loss_in_db
    run.environment = {}
    assert not run.series().loss_in_db
    run.recipe["loss"]["name"] = "neg_snr"
    assert run.series().loss_in_db
    run.environment = {"loss_in_db": False}  # with inactive_weight, say
    assert not run.series().loss_in_db


def test_the_sample_of_a_long_run_is_evenly_spaced_and_has_all_of_the_last_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("unbraid.columns._EvenSample.LIMIT", 8)
    monkeypatch.setattr("unbraid.columns._EvenSample.N_LAST", 3)

    sampled = read_series(write(Run(2000), tmp_path / "run")).sampled

    assert sampled.step.tolist() == [50, 450, 850, 1250, 1650, 1900, 1950, 2000]
    assert len(sampled.items) == len(sampled.grad_norms) == len(sampled.update_ratios) == 8
    assert np.isfinite(sampled.grad_norms).all()


def test_columns_collected_in_blocks_equal_those_collected_at_once(tmp_path):
    run = Run(1000)
    run.change(301, 310, si_sdr=[], outcome="nonfinite_gradient", grad_norm=None, grad_norm_text="inf")
    apart, together = StepColumns(), StepColumns()
    for first in range(0, 1000, 70):
        apart.add(run.steps[first : first + 70], 1)
    together.add(run.steps)

    for actual, expected in zip(apart.finish()[:3], together.finish()[:3], strict=True):
        if isinstance(actual, dict):
            assert all(np.array_equal(actual[name], expected[name], equal_nan=True) for name in expected)
        else:
            assert np.array_equal(actual, expected, equal_nan=actual.dtype.kind == "f")
    assert apart.n_torn == 15


@pytest.mark.parametrize("make", [None, "empty"])
def test_a_folder_without_a_run_is_a_one_line_error(make, tmp_path, capsys):
    path = tmp_path / "run"
    if make:
        path.mkdir()

    with pytest.raises(CheckpointError):
        read_series(path)
    assert main(["doctor", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_listed_losses_in_db_are_those_of_the_library():
    assert {LOSSES[name] for name in DB_LOSSES} == IN_DB


def test_the_doctor_needs_no_torch(tmp_path):
    path = write(Run(1200), tmp_path / "run")
    code = "import sys; from unbraid.cli.main import main; main(sys.argv[1:]); print('torch' in sys.modules)"

    output = subprocess.run(
        [sys.executable, "-c", code, "doctor", str(path)], capture_output=True, text=True, check=True
    )

    assert output.stdout.splitlines()[-1] == "False"


def sick(tmp_path):
    run = Run()
    run.change_items(estimate_levels_db=[-25.0, -200.0]).change(data_seconds=0.2, clipped=False)
    run.change_blocks(update_ratio=1e-3).change(lr=1e-6)
    run.recipe["optim"]["lr"] = 1e-6
    for row in run.validations:
        row["si_sdri"] = -0.4
    return write(run, tmp_path / "sick")


def test_the_doctor_prints_at_most_three_findings_worst_first(tmp_path, capsys):
    path, healthy = sick(tmp_path), write(Run(), tmp_path / "healthy")

    assert main(["doctor", str(path)]) == 2
    output = capsys.readouterr().out
    assert output.startswith(f"{path}: 2000 steps, 1 critical finding, 2 warnings, 1 note.")
    assert [line.split()[1] for line in output.splitlines() if line[:1].isupper()] == [
        "DEAD_OUTPUT,",
        "LOADER_BOUND,",
        "LR_TOO_LOW,",
    ]
    assert "[data.workers]" in output
    assert "1 more with --all." in output
    assert main(["doctor", str(path), "--all", "--mute", "DEAD_OUTPUT"]) == 1
    assert "CLIPPING_INACTIVE" in capsys.readouterr().out
    assert main(["doctor", str(healthy)]) == 0
    assert capsys.readouterr().out == f"{healthy}: 2000 steps, healthy.\n"


def test_muting_an_unknown_code_is_an_error(tmp_path, capsys):
    path = write(Run(60), tmp_path / "run")

    assert main(["doctor", str(path), "--mute", "dead_outputs"]) == 2

    output = capsys.readouterr().err
    assert output.startswith("unbraid: 'dead_outputs' cannot be muted")
    assert output.endswith("Did you mean 'DEAD_OUTPUT'?\n")


def test_the_doctor_prints_json_for_scripts(tmp_path, capsys):
    path = sick(tmp_path)

    assert main(["doctor", str(path), "--json"]) == 2

    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2000
    assert [one["code"] for one in found["findings"]] == [one.code for one in run_rules(read_series(path))]


def test_the_doctor_line_is_one_line_and_never_raises(tmp_path, monkeypatch):
    path, healthy = sick(tmp_path), write(Run(), tmp_path / "healthy")

    assert doctor_line(healthy) == "doctor: healthy"
    assert doctor_line(path).startswith(
        "doctor: 1 critical finding, 2 warnings, 1 note: DEAD_OUTPUT, Output 2 of the model"
    )
    assert "\n" not in doctor_line(path)
    monkeypatch.setattr("unbraid.health.rules.run_rules", lambda _series: 1 / 0)
    assert doctor_line(path) == "doctor: could not check the run (ZeroDivisionError: division by zero)"


@pytest.mark.parametrize(
    "damage",
    [
        test_rules.sick_overfitting,
        test_rules.sick_plateau,
        test_rules.sick_memory,
        test_rules.sick_pace,
        test_rules.sick_source,
        test_rules.sick_targets,
        test_rules.sick_unvalidated,
    ],
)
def test_problems_that_need_the_first_steps_are_found_late_in_a_thinned_run(damage, tmp_path):
    run = Run(8000, every=800)
    damage(run)
    path = write(run, tmp_path / "run")

    thinned, complete = (read_series(path, **how) for how in ({"last": 1500, "thinned": True}, {}))

    found = {finding.code for finding in run_rules(complete)}
    assert found
    assert {finding.code for finding in run_rules(thinned)} >= found & test_rules.NEEDS_FIRST_STEPS
    assert found & test_rules.NEEDS_FIRST_STEPS


@pytest.mark.parametrize("make", [lambda _: None, *test_rules.HEALTHY])
def test_a_thinned_healthy_run_has_no_findings(make, tmp_path):
    run = Run(4000, every=400)
    make(run)

    assert run_rules(read_series(write(run, tmp_path / "run"), last=1000, thinned=True)) == []


def test_the_doctor_line_reads_no_more_lines_late_in_a_run(tmp_path, monkeypatch):
    paths = [write(Run(n_steps, every=n_steps // 4), tmp_path / str(n_steps)) for n_steps in (4000, 16000)]
    monkeypatch.setattr("unbraid.health.rules.RECENT_STEPS", 500)
    parse, counts = io._parse_line, []

    for path in paths:
        lines = []
        monkeypatch.setattr(io, "_parse_line", lambda line, lines=lines: lines.append(1) or parse(line))
        assert doctor_line(path) == "doctor: healthy"
        counts.append(len(lines))

    assert counts[1] <= counts[0] < 4500


def test_skipped_steps_are_not_among_the_trained_values():
    made = Run(10)
    for index, outcome in ((3, "nonfinite_loss"), (4, "all_filtered")):
        made.steps[index].update(outcome=outcome, loss=-500.0)

    series = made.series()

    assert series.trained_values("loss")[0].tolist() == [1, 2, 3, 6, 7, 8, 9, 10]
    assert {reason: np.flatnonzero(marked).tolist() for reason, marked in series.skipped.items()} == {
        "nonfinite_loss": [3],
        "all_filtered": [4],
    }
