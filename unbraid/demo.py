"""unbraid demo: talkers made on the spot, training, evaluation, separated sound, a picture, a report, what next."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unbraid.config.recipe import load_recipe
from unbraid.console import command_name, progress_bar, show_training
from unbraid.data.synthetic import make_synthetic_speech
from unbraid.evaluate import Summary, evaluate_checkpoint
from unbraid.health.rules import doctor_line
from unbraid.plots import check_matplotlib, draw_run
from unbraid.run import train
from unbraid.run_directory import RunDirectory
from unbraid.signals import stop_on_signals
from unbraid.web.report import write_report

N_TEST_ITEMS, N_AUDIO, N_WORST = 100, 5, 3


@dataclass(frozen=True)
class DemoResult:
    """What came out, and where it lies."""

    run: RunDirectory
    summaries: dict[str, Summary]
    n_items: int
    sample_rate: int
    audio: Path
    picture: Path
    report: Path


def run_demo(recipe_path: Path, out: Path, *, overrides: Sequence[str] = ()) -> DemoResult | int:
    """Go the whole way from nothing to separated sound; called again, it goes on where it was stopped.

    Args:
        recipe_path: The demo's recipe.
        out: Folder for all of it.
        overrides: As ``--set`` gives them.

    Returns:
        The result; or the number of the signal that stopped the training, after which a checkpoint is there.

    Raises:
        UserError: If a package of the extra ``demo`` is missing, or as `train` does.
    """
    check_matplotlib()
    recipe = load_recipe(recipe_path, overrides)
    with progress_bar("making talkers", 1.0) as advance:
        table = make_synthetic_speech(
            out / "voices", n_utterances=8, progress=lambda done, total: advance(done / total, f"{done} of {total}")
        )
    recipe = replace(recipe, data=replace(recipe.data, path=table.absolute()))
    run = RunDirectory(out / "run")
    with stop_on_signals() as stop:
        records = train(recipe, run, resume=run.recipe.exists(), stop=stop)
        steps, minutes = recipe.train.max_steps, recipe.train.max_minutes
        show_training(records, max_steps=steps, max_minutes=minutes, doctor_line=lambda: doctor_line(run.path))
    if stop.agreed:
        return stop.agreed
    with progress_bar("evaluating", N_TEST_ITEMS) as advance:
        found = evaluate_checkpoint(
            run.path,
            n_items=N_TEST_ITEMS,
            save_audio=N_AUDIO,
            save_worst=N_WORST,
            progress=lambda done, _: advance(done),
        )
    assert found.audio is not None
    picture = draw_run(run, found.audio, 0, out / "demo.png")
    report = write_report(run.path, out / "report.html")
    return DemoResult(run, found.summaries, len(found.rows), recipe.data.sample_rate, found.audio, picture, report)


def what_next(result: DemoResult) -> list[str]:
    """Where to listen and look, and three things to try."""
    run, out, unbraid = result.run.path, result.run.path.parent, command_name()
    return [
        f"Listen:  {result.audio}: 000-mixture.wav, then 000-estimate-1.wav and 000-estimate-2.wav",
        f"Look:    {result.picture}, and all of it, with sound, in a browser: {result.report}",
        "Try next:",
        f"  your own sound       {unbraid} separate MIXTURE.wav -m {run} -o separated",
        f"  your own recordings  {unbraid} train conv_tasnet_small --set data.path=FOLDER_OF_SPEAKERS",
        f"  another clipper      {unbraid} demo -o {out}-autoclip --set clip.name=autoclip",
    ]
