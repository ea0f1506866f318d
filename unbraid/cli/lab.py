"""``unbraid lab ...``: each command parses its options, calls the laboratory and prints. Torch is imported late."""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbraid.cli.options import (
    Add,
    Parser,
    add_set,
    add_trust,
    exit_status,
    file_to_write,
    folder,
    positive,
    resume_advice,
)
from unbraid.config.shipped_recipes import find_recipe
from unbraid.printable import say

if TYPE_CHECKING:
    from unbraid.lab.lr_range import LrGrid, RangeTest
    from unbraid.signals import StopRequest


def add_lab(commands: Any) -> None:
    """Add ``lab`` and its commands to the command line."""
    lab_text = "Experiments: gradient descent on a line, and measurements on separation models."
    lab = commands.add_parser("lab", help=lab_text, description=lab_text, allow_abbrev=False)
    experiments = lab.add_subparsers(metavar="EXPERIMENT", required=True, parser_class=Parser)

    def add(name: str, function: object) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").strip()
        command: argparse.ArgumentParser = experiments.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(function=function)
        return command

    _add_gradient_descent(add)
    _add_lr_range(add)
    _add_race(add)
    _add_trajectory(add)
    _add_clipping(add)
    _add_landscape(add)
    _add_sharpness(add)


def gradient_descent(args: argparse.Namespace) -> int:
    """Draw gradient descent on a line and on surfaces: the figures of the chapter, their numbers, and a page."""
    from unbraid.plots import check_matplotlib

    check_matplotlib()
    from unbraid.console import progress_bar
    from unbraid.textbook.animation import has_ffmpeg
    from unbraid.textbook.chapter import write_chapter

    with progress_bar("drawing", 1.0) as advance:
        page = write_chapter(args.out, loss=args.loss, seed=args.seed, animate=args.animation, progress=advance)
    if args.animation and not has_ffmpeg():
        say("ffmpeg is not installed, so the animations are GIF files only, without MP4.")
    say(f"Figures and numbers are in {args.out}. To see them, open {page}")
    return 0


def _add_gradient_descent(add: Add) -> None:
    command = add("gradient-descent", gradient_descent)
    out_help = "folder for figures, numbers and page (%(default)s)"
    command.add_argument("-o", "--out", type=folder, default=Path("gradient-descent"), metavar="DIR", help=out_help)
    command.add_argument("--loss", choices=("l1", "l2", "huber"), default="l2", help="loss of the line (%(default)s)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random numbers (%(default)s)")
    no_help = "skip the animations, which take most of the time"
    command.add_argument("--no-animation", dest="animation", action="store_false", help=no_help)


def lr_range(args: argparse.Namespace) -> int:
    """Raise the learning rate from step to step on a recipe's model, and suggest one."""
    from unbraid.lab.lr_range_figure import range_test_json, write_lr_range
    from unbraid.plots import check_matplotlib
    from unbraid.signals import stop_on_signals

    out = args.out or (None if args.json else Path("lr-range"))
    if out is not None:
        check_matplotlib()
    with stop_on_signals() as stop:
        test, grid = _lr_range_and_grid(args, out, stop)
        figure = write_lr_range(out, test, grid) if out is not None and len(test.lrs) else None
    if args.json:
        print(json.dumps(range_test_json(test, grid), indent=1, allow_nan=False))
    else:
        say(*_lr_range_lines(test, grid, figure))
    advice = "" if args.json else "To start over, run the same command; fewer --steps take less time."
    return exit_status(stop.signal, advice)


def _lr_range_and_grid(
    args: argparse.Namespace, out: Path | None, stop: "StopRequest"
) -> "tuple[RangeTest, LrGrid | None]":
    from unbraid.config.recipe import load_recipe
    from unbraid.console import progress_bar
    from unbraid.lab.experiment import experiment_from_recipe
    from unbraid.lab.lr_range import learning_rates, lr_grid, lr_range, lrs_around

    lrs = learning_rates(args.start, args.end, args.steps)
    experiment = experiment_from_recipe(load_recipe(find_recipe(args.recipe), args.set), args.recipe.stem)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    # With --json nothing but JSON is printed, so no progress bar.
    quiet = nullcontext(lambda _done, _text: None)

    # The range test, then a grid around its suggestion.
    with quiet if args.json else progress_bar("range test", len(lrs)) as advance:
        test = lr_range(experiment, lrs, stop=stop, progress=advance)
    if not args.grid or test.suggestion is None or stop.signal:
        return test, None
    candidates = lrs_around(test.suggestion)
    with quiet if args.json else progress_bar("grid", len(candidates)) as advance:
        grid = lr_grid(experiment, candidates, stop=stop, progress=advance)
    return test, grid if len(grid.lrs) else None


def _lr_range_lines(test: "RangeTest", grid: "LrGrid | None", figure: Path | None) -> list[str]:
    from unbraid.lab.lr_range import format_lr
    from unbraid.lab.lr_range_figure import summary_sentences

    lines = summary_sentences(test, grid)
    if test.suggestion is not None:
        lines.append(f"To use it: --set optim.lr={format_lr(test.suggestion)}")
    if figure is not None:
        lines.append(f"Figure: {figure}. The numbers are in the same folder.")
    return lines


def _add_lr_range(add: Add) -> None:
    command = add("lr-range", lr_range)
    command.add_argument("recipe", type=Path, help="a TOML file, or the name of a built-in recipe")
    add_set(command)
    rate: Any = {"type": float, "metavar": "LR"}
    command.add_argument("--from", dest="start", default=1e-7, help="first learning rate (%(default)s)", **rate)
    command.add_argument(
        "--to",
        dest="end",
        default=10.0,
        help="last learning rate, unless the loss diverges before (%(default)s)",
        **rate,
    )
    command.add_argument(
        "--steps", type=int, default=200, metavar="N", help="number of steps from first to last (%(default)s)"
    )
    grid_help = "check the suggestion: train 50 steps with each of seven learning rates around it"
    command.add_argument("--grid", action="store_true", help=grid_help)
    out_help = "folder for figure and numbers (lr-range; none with --json)"
    command.add_argument("-o", "--out", type=folder, metavar="DIR", help=out_help)
    command.add_argument("--json", action="store_true", help="print all numbers as JSON")


def race(args: argparse.Namespace) -> int:
    """Compare optimizers, clippers or other choices, trained from the same weights on the same batches."""
    from unbraid.lab.race_run import run_race

    return _run_until_stopped(
        lambda stop: run_race(
            find_recipe(args.recipe),
            args.over,
            args.out,
            n_steps=args.steps,
            seeds=args.seeds,
            overrides=args.set,
            json_file=args.json,
            stop=stop,
        ),
        args.argv,
    )


def clipping(args: argparse.Namespace) -> int:
    """Repeat the AutoClip paper's table at a small scale: percentiles by losses, evaluated on unseen speakers."""
    from unbraid.lab.clipping_run import run_clipping

    return _run_until_stopped(
        lambda stop: run_clipping(
            find_recipe(args.recipe),
            args.out,
            percentiles=args.percentiles,
            losses=args.losses,
            steps=args.steps,
            seeds=args.seeds,
            n_items=args.test_items,
            overrides=args.set,
            json_file=args.json,
            markdown_file=args.markdown,
            command=args.argv,
            stop=stop,
        ),
        args.argv,
    )


def _run_until_stopped(run: "Callable[[StopRequest], list[str]]", argv: Sequence[str]) -> int:
    """Run a sweep and print its lines; if a signal stops it, print how to resume.

    Returns:
        The exit status: 0, or 128 plus the number of the signal.
    """
    from unbraid.lab.sweep import Interrupted
    from unbraid.signals import stop_on_signals

    try:
        with stop_on_signals() as stop:
            lines = run(stop)
    except Interrupted as interrupted:
        return exit_status(interrupted.number, resume_advice(argv))
    say(*lines)
    return 0


def _add_race(add: Add) -> None:
    command = add("race", race)
    over_help = "what to compare, such as optim.name=sgd,adam; several options are combined"
    command.add_argument("--over", action="append", default=[], metavar="KEY=A,B", help=over_help)
    command.add_argument(
        "--steps", type=positive(int), default=300, metavar="N", help="steps of each run (%(default)s)"
    )
    _add_grid(command, "race", 3)


def _add_clipping(add: Add) -> None:
    command = add("clipping", clipping)
    p_help = "percentiles of the gradient norms so far to clip to; 100 never clips (0 1 10 25 50 90 100)"
    command.add_argument("--percentiles", type=float, nargs="+", metavar="P", help=p_help)
    losses_help = "deep_clustering whitened_kmeans mask_inference snr conv_tasnet sepformer (all)"
    command.add_argument("--losses", nargs="+", metavar="NAME", help=losses_help)
    steps_help = "steps of each run, or by loss, such as snr=600 conv_tasnet=300 (1000)"
    command.add_argument("--steps", nargs="+", default=["1000"], metavar="N", help=steps_help)
    items_help = "number of test mixtures to evaluate on (%(default)s)"
    command.add_argument("--test-items", type=positive(int), default=100, metavar="N", help=items_help)
    command.add_argument(
        "--markdown",
        type=file_to_write,
        metavar="FILE",
        help="also write the table to FILE; an older table in it is replaced",
    )
    _add_grid(command, "clipping", 2)


def _add_grid(command: argparse.ArgumentParser, out: str, seeds: int) -> None:
    """Add the options of commands that train a grid of runs."""
    command.add_argument("recipe", type=Path, help="a TOML file, or the name of a built-in recipe")
    add_set(command)
    command.add_argument(
        "--seeds", type=int, default=seeds, metavar="N", help="number of seeds of each arm (%(default)s)"
    )
    out_help = "folder for all runs; the same command resumes the runs in it (%(default)s)"
    command.add_argument("-o", "--out", type=folder, default=Path(out), metavar="DIR", help=out_help)
    command.add_argument(
        "--json", type=file_to_write, metavar="FILE", help="file for the numbers (a file in the folder)"
    )


def trajectory(args: argparse.Namespace) -> int:
    """Measure step size, loss, gradient norm and smoothness along a training run, with and without AutoClip."""
    from unbraid.console import progress_bar
    from unbraid.lab.trajectory_run import load_experiment, run_arms, write_comparison
    from unbraid.signals import stop_on_signals

    experiment = load_experiment(
        find_recipe(args.recipe), args.set, n_steps=args.steps, every=args.every, clips=args.clip
    )
    with stop_on_signals() as stop, progress_bar("training", 1.0) as advance:
        options = {"clips": args.clip, "n_steps": args.steps, "every": args.every}
        comparison = run_arms(experiment, args.out, **options, stop=stop, progress=advance)
    say(*comparison.summary_lines(), *write_comparison(comparison, args.out, args.json))
    return exit_status(stop.signal, resume_advice(args.argv))


def _add_trajectory(add: Add) -> None:
    command = add("trajectory", trajectory)
    command.add_argument("recipe", type=Path, help="a TOML file, or the name of a built-in recipe")
    add_set(command)
    command.add_argument(
        "--steps", type=positive(int), default=500, metavar="N", help="steps of each arm (%(default)s)"
    )
    every_help = "measure the smoothness every N steps; a measurement costs as much as four steps (%(default)s)"
    command.add_argument("--every", type=positive(int), default=5, metavar="N", help=every_help)
    clip_help = "one arm for each clipper: none, autoclip, another one, or recipe for the recipe's own (none autoclip)"
    command.add_argument("--clip", nargs="+", default=["none", "autoclip"], metavar="NAME", help=clip_help)
    out_help = "folder for figure, numbers and checkpoints (%(default)s)"
    command.add_argument("-o", "--out", type=folder, default=Path("trajectory"), metavar="DIR", help=out_help)
    command.add_argument(
        "--json", type=file_to_write, metavar="FILE", help="file for the numbers (trajectory.json in the folder)"
    )


def landscape(args: argparse.Namespace) -> int:
    """Draw the loss around a trained model, on the line to another one, or in the plane of a run's path."""
    from unbraid.plots import check_matplotlib

    check_matplotlib()
    # A missing matplotlib is reported before the slow import of torch.
    from unbraid.console import progress_bar
    from unbraid.lab.experiment import experiment_from_checkpoint
    from unbraid.lab.landscape_run import choose_view, draw_landscape, output_folder, summary_lines
    from unbraid.signals import stop_on_signals

    experiment = experiment_from_checkpoint(args.checkpoint, overrides=args.set, trust=args.trust)
    run = args.checkpoint if args.plane else None
    out = output_folder(args.checkpoint, experiment, args.out)
    view = choose_view(experiment, other=args.to, run=run, span=args.span, n_points=args.points, seed=args.seed)
    with stop_on_signals() as stop, progress_bar("computing losses", len(view.points.coefficients)) as advance:
        losses, figures = draw_landscape(
            experiment, view, out, n_items=args.items, split=args.split, stop=stop, progress=advance
        )
    for line in summary_lines(losses, figures, out, args.items):
        say(line)
    return exit_status(losses.signal)


def _add_landscape(add: Add) -> None:
    command = add("landscape", landscape)
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder, or run directory")
    where = command.add_mutually_exclusive_group()
    to_help = "the straight line to another checkpoint of the same model, and the height of the barrier between them"
    where.add_argument("--to", type=Path, metavar="OTHER", help=to_help)
    plane_help = (
        "the plane through the last checkpoint of the run directory CHECKPOINT, along the principal axes of its path"
    )
    where.add_argument("--plane", action="store_true", help=plane_help)
    points_help = "points along each axis; odd if the model is in the middle (%(default)s)"
    command.add_argument("--points", type=int, default=21, metavar="N", help=points_help)
    span_help = "range of the axes: in norms of the filters (1), or as a share beyond the line or path (0.25)"
    command.add_argument("--span", type=positive(float), metavar="S", help=span_help)
    items_help = "number of mixtures that the loss is averaged over (%(default)s)"
    command.add_argument("--items", type=positive(int), default=16, metavar="N", help=items_help)
    command.add_argument(
        "--split", choices=("train", "valid"), default="train", help="split of the mixtures (%(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the directions (%(default)s)")
    out_help = "folder for figures and numbers (landscape/RUN-STEP)"
    command.add_argument("-o", "--out", type=folder, metavar="DIR", help=out_help)
    add_set(command, "data.path=FOLDER, if the recordings have moved")
    add_trust(command)


def sharpness(args: argparse.Namespace) -> int:
    """Measure the largest eigenvalue of the Hessian, the learning rate it allows, and the gradient noise scale."""
    from unbraid.console import progress_bar
    from unbraid.io import write_json
    from unbraid.lab.experiment import experiment_from_checkpoint
    from unbraid.lab.sharpness import describe, measure_sharpness
    from unbraid.signals import stop_on_signals

    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    experiment = experiment_from_checkpoint(args.checkpoint, overrides=args.set, trust=args.trust)
    options = {"n_items": args.items, "n_products": args.iterations, "split": args.split, "seed": args.seed}
    with stop_on_signals() as stop, progress_bar("multiplying", args.iterations) as advance:
        result = measure_sharpness(experiment, **options, stop=stop, progress=advance)
    say(*describe(result))
    if args.out:
        write_json(args.out, result.as_json())
    return exit_status(result.signal)


def _add_sharpness(add: Add) -> None:
    command = add("sharpness", sharpness)
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder, or run directory")
    iterations_help = "at most N products with the Hessian (%(default)s)"
    command.add_argument("--iterations", type=positive(int), default=200, metavar="N", help=iterations_help)
    items_help = "number of mixtures that the loss is averaged over, 3 or more (%(default)s)"
    command.add_argument("--items", type=positive(int), default=32, metavar="N", help=items_help)
    command.add_argument(
        "--split", choices=("train", "valid"), default="train", help="split of the mixtures (%(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the first vector (%(default)s)")
    command.add_argument("-o", "--out", type=file_to_write, metavar="FILE", help="JSON file for the numbers")
    add_set(command, "data.path=FOLDER, if the recordings have moved")
    add_trust(command)
