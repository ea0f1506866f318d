import json
import re
import subprocess
import sys

import pytest
from made_up import BLOCKS, Run
from matplotlib.figure import Figure

from unbraid.cli.main import main
from unbraid.errors import UserError
from unbraid.health.series import read_series
from unbraid.plots import PLOTS, draw_plots, draw_run
from unbraid.run_directory import RunDirectory


def test_the_overview_of_a_run_is_a_png(recipe_file, tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", str(recipe_file()), "--run", str(run)])
    main(["evaluate", str(run), "--n-items", "1", "--save-audio", "1"])

    picture = draw_run(RunDirectory(run), run / "evaluation-audio", 0, tmp_path / "deep" / "run.png")

    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


PNG = b"\x89PNG\r\n\x1a\n"


def written(folder, fake):
    """A run directory of made-up records, with steps 100 to 109 skipped as NaN and step 7 as all filtered."""
    folder.mkdir()
    run = RunDirectory(folder)
    for row in fake.steps:
        row["examples_per_second"] = 30.0
    for row in fake.steps[99:109]:
        row |= {"outcome": "nonfinite_loss", "loss": None, "loss_text": "nan", "grad_norm": 1e9, "clipped": False}
    fake.steps[6:7] = [row | {"outcome": "all_filtered", "loss": -500.0, "clipped": False} for row in fake.steps[6:7]]
    run.steps.write_text("".join(json.dumps(row) + "\n" for row in fake.steps))
    rows = [row | {"n_items": 5, "best": index == 1} for index, row in enumerate(fake.validations)]
    run.validation.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def drawn(run, name):
    """A figure's lines, by their label; and its axes."""
    figure = Figure()
    assert PLOTS[name](figure, read_series(run.path))
    lines = {line.get_label(): line.get_xydata() for axes in figure.axes for line in axes.lines}
    return lines, figure.axes


def test_each_curve_of_a_run_is_drawn_as_a_png(tmp_path):
    run = written(tmp_path / "run", Run(600))

    files = draw_plots(run, tmp_path / "deep" / "plots")

    assert [file.name for file in files] == [f"{name}.png" for name in PLOTS]
    assert {file.read_bytes()[:8] for file in files} == {PNG}


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_skipped_steps_are_marks_with_their_reason_and_not_in_a_curve(tmp_path, name):
    lines, (axes,) = drawn(written(tmp_path / "run", Run(600)), name)

    assert lines["skipped: nonfinite loss (10)"][:, 0].tolist() == list(range(100, 110))
    assert lines["skipped: all filtered (1)"][:, 0].tolist() == [7]
    values = [xy for label, xy in lines.items() if "skipped" not in label and label != "max_norm"]
    assert not {7, *range(100, 110)} & {int(step) for xy in values for step in xy[:, 0]}
    assert axes.get_ylim()[0] > -100
    assert axes.get_ylim()[1] < 1e4


def test_validation_is_drawn_with_the_training_loss_and_the_best_is_marked(tmp_path):
    fake = Run(600)
    run = written(tmp_path / "run", fake)

    assert drawn(run, "loss")[0]["validation"].tolist() == [[row["step"], row["loss"]] for row in fake.validations]
    best = fake.validations[1]
    label = f"lowest loss: {best['si_sdri']:.2f} dB at step 400"
    assert drawn(run, "valid_si_sdri")[0][label].tolist() == [[400, best["si_sdri"]]]


def test_clipped_share_is_of_trained_steps_and_skipped_share_of_all(tmp_path):
    run = written(tmp_path / "run", Run(600))

    _, (axes,) = drawn(run, "clipped_and_skipped")

    shares = {patch.get_label(): patch.get_data().values for patch in axes.patches}
    assert shares["skipped: nonfinite loss"].tolist() == [0] * 9 + [10, 90] + [0] * 49
    clipped = read_series(run.path)
    share = 100 * (clipped.steps["clipped"] == 1)[10:20].mean()
    assert shares["clipped, of the trained steps"][1] == pytest.approx(share)


def test_every_block_has_a_curve_of_update_ratios(tmp_path):
    lines, _ = drawn(written(tmp_path / "run", Run(600)), "update_ratio")

    assert [len(lines[block]) for block in BLOCKS] == [12] * len(BLOCKS)


@pytest.mark.parametrize("n_steps", [1, 2, 7])
def test_a_run_of_few_steps_is_drawn_as_far_as_it_has_data(tmp_path, n_steps):
    run = written(tmp_path / "run", Run(n_steps))

    names = [file.stem for file in draw_plots(run, tmp_path / "plots")]

    assert names == ["loss", "gradient_norm", "clipped_and_skipped", "learning_rate", "throughput"]


def test_a_run_without_a_trained_step_still_has_its_marks(tmp_path):
    fake = Run(30)
    run = written(tmp_path / "run", fake)
    rows = [row | {"outcome": "nonfinite_loss", "loss": None, "loss_text": "nan"} for row in fake.steps]
    run.steps.write_text("".join(json.dumps(row) + "\n" for row in rows))

    names = [file.stem for file in draw_plots(run, tmp_path / "plots")]

    assert names == ["loss", "clipped_and_skipped", "learning_rate"]


def test_a_run_without_steps_is_an_error(tmp_path):
    run = written(tmp_path / "run", Run(1))
    run.steps.write_text("")

    with pytest.raises(UserError, match="no steps yet; there is nothing to draw"):
        draw_plots(run, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_drawing_imports_no_torch():
    script = "import sys, unbraid.plots; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.slow
def test_drawing_a_million_steps_takes_less_than_a_gigabyte(tmp_path):
    run = written(tmp_path / "run", Run(10_000))
    block = run.steps.read_bytes()
    with run.steps.open("ab") as file:
        for _ in range(99):
            file.write(block)
    script = (
        "import sys; from pathlib import Path; from unbraid.plots import draw_plots; "
        "from unbraid.run_directory import RunDirectory; "
        "draw_plots(RunDirectory(Path(sys.argv[1])), Path(sys.argv[2])); "
        "print(Path('/proc/self/status').read_text())"
    )

    command = [sys.executable, "-c", script, str(run.path), str(tmp_path / "plots")]
    output = subprocess.run(command, check=True, timeout=600, capture_output=True, text=True).stdout

    peak = re.search(r"VmHWM:\s+(\d+) kB", output)  # getrusage would include the process that started it
    assert int(peak[1]) < 1_000_000
