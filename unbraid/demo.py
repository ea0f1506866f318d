"""unbraid demo: generate speakers, train, evaluate, and write separated audio, a picture and a report."""

import shlex
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

N_TEST_ITEMS = 100
N_AUDIO = 5
N_WORST = 3


@dataclass(frozen=True)
class DemoResult:
    """Metrics and output paths of the demo."""

    run: RunDirectory
    summaries: dict[str, Summary]
    n_items: int
    sample_rate: int
    audio: Path
    picture: Path
    report: Path


def run_demo(recipe_path: Path, out: Path, *, overrides: Sequence[str] = ()) -> DemoResult | int:
    """Run the demo from generated speakers to separated audio; a stopped demo resumes when called again.

    Args:
        recipe_path: Recipe of the demo.
        out: Folder for all output.
        overrides: ``KEY=VALUE`` texts, as from ``--set``.

    Returns:
        The result; or the number of the signal that stopped the training, after saving a checkpoint.

    Raises:
        UserError: If a package of the extra ``demo`` is missing, or as `train` does.
    """
    check_matplotlib()
    recipe = load_recipe(recipe_path, overrides)
    # 1. Generate speakers; existing ones are kept.
    with progress_bar("generating speakers", 1.0) as advance:
        table = make_synthetic_speech(
            out / "voices", n_utterances=8, progress=lambda done, total: advance(done / total, f"{done} of {total}")
        )
    recipe = replace(recipe, data=replace(recipe.data, path=table.absolute()))

    # 2. Train, or resume.
    run = RunDirectory(out / "run")
    with stop_on_signals() as stop:
        records = train(recipe, run, resume=run.recipe.exists(), stop=stop)
        show_training(
            records,
            max_steps=recipe.train.max_steps,
            max_minutes=recipe.train.max_minutes,
            doctor_line=lambda: doctor_line(run.path),
        )
    if stop.agreed:
        return stop.agreed

    # 3. Evaluate on unseen speakers, and show the results.
    with progress_bar("evaluating", N_TEST_ITEMS) as advance:
        evaluation = evaluate_checkpoint(
            run.path,
            n_items=N_TEST_ITEMS,
            save_audio=N_AUDIO,
            save_worst=N_WORST,
            progress=lambda done, _: advance(done),
        )
    assert evaluation.audio is not None
    picture = draw_run(run, evaluation.audio, 0, out / "demo.png")
    report = write_report(run.path, out / "report.html")
    return DemoResult(
        run, evaluation.summaries, len(evaluation.rows), recipe.data.sample_rate, evaluation.audio, picture, report
    )


def what_next(result: DemoResult) -> list[str]:
    """Return lines for the terminal: where the audio and the picture are, and three commands to try."""
    run = shlex.quote(str(result.run.path))
    autoclip_out = shlex.quote(f"{result.run.path.parent}-autoclip")
    unbraid = command_name()
    return [
        f"Listen:  {result.audio}: 000-mixture.wav, then 000-estimate-1.wav and 000-estimate-2.wav",
        f"Look:    {result.picture}, or everything with audio in a browser: {result.report}",
        "Try next:",
        f"  your own mixture     {unbraid} separate MIXTURE.wav -m {run} -o separated",
        f"  your own recordings  {unbraid} train conv_tasnet_small --set data.path=FOLDER_OF_SPEAKERS",
        f"  another clipper      {unbraid} demo -o {autoclip_out} --set clip.name=autoclip",
    ]
