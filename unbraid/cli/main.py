"""The commands: each parses its options, calls the library and prints. Torch is imported only when one runs."""

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from unbraid import __version__
from unbraid.cli.keys import keys, unknown_options
from unbraid.cli.lab import add_lab
from unbraid.cli.options import Parser, add_set, add_trust, exit_status, port_number, positive, resume_advice
from unbraid.config.shipped_recipes import find_recipe, recipes_folder
from unbraid.errors import EXIT_USER_ERROR, UserError
from unbraid.printable import say


def train(args: argparse.Namespace) -> int:
    """Train a separation model by a recipe."""
    recipe_path = find_recipe(args.recipe)  # a misspelt name is refused before the seconds that torch takes to load

    from unbraid.config.recipe import load_recipe
    from unbraid.console import command_name, show_training
    from unbraid.health.rules import doctor_line
    from unbraid.run import train as run_training
    from unbraid.run_directory import RunDirectory
    from unbraid.signals import stop_on_signals

    recipe = load_recipe(recipe_path, args.set)
    run = RunDirectory(args.run or Path("runs") / args.recipe.stem)
    resume = args.resume or (args.resume_if_present and run.recipe.exists())
    with stop_on_signals() as stop:
        records = run_training(recipe, run, resume=resume, stop=stop)
        show_training(
            records,
            max_steps=recipe.train.max_steps,
            max_minutes=recipe.train.max_minutes,
            doctor_line=lambda: doctor_line(run.path),
        )
    # Of the processes that torchrun started, only the first prints.
    if os.environ.get("RANK", "0") != "0":
        return exit_status(stop.agreed)
    if stop.agreed:
        if "WORLD_SIZE" in os.environ:
            return exit_status(stop.agreed, "To resume, run the same torchrun command with --resume.")
        return exit_status(
            stop.agreed, resume_advice([*args.argv, *([] if args.resume or args.resume_if_present else ["--resume"])])
        )
    arguments = shlex.join(["evaluate", str(run.path), *["--trust"] * recipe.has_custom_code])
    say(f"The run is in {run.path}. Next: {command_name()} {arguments}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate a trained model on mixtures of unseen speakers."""
    from unbraid.console import print_summaries, progress_bar
    from unbraid.evaluate import evaluate_checkpoint

    names = ("data", "split", "n_items", "seconds", "save_audio", "save_worst", "out", "trust")
    options = {name: getattr(args, name) for name in names}
    with progress_bar("evaluating", args.n_items) as advance:
        evaluation = evaluate_checkpoint(args.checkpoint, progress=lambda done, _: advance(done), **options)

    # The title says which numbers are not comparable with others.
    files = {file for row in evaluation.rows for file in row["files"].split(" + ")}
    title = f"{len(evaluation.rows)} mixtures of {len(files)} files in {evaluation.recipe.data.path} ({args.split})"
    if evaluation.recipe.assign == "mixit":
        title += "; outputs summed to fit each mixture best (assign = 'mixit')"
    print_summaries(evaluation.summaries, title)

    # Output files, the worst mixtures, what the means do not count, and the files that could not be used.
    say(f"Metrics of each mixture: {evaluation.table}" + (f"; audio: {evaluation.audio}" if evaluation.audio else ""))
    if evaluation.worst:
        worst = ", ".join(f"{row['index']:03d} {row['si_sdri']:+.2f} dB" for row in evaluation.worst)
        say(f"Worst first: {worst}")
    n_undefined = len(evaluation.rows) - evaluation.summaries["si_sdri"].n_items
    if n_undefined:
        say(
            f"{n_undefined} of {len(evaluation.rows)} mixtures have no SI-SDRi and do not count in its mean: their "
            "references are silent, or alone in the mixture."
        )
    for message in evaluation.bad_files.values():
        say(f"Skipped: {message}")
    return 0


def separate(args: argparse.Namespace) -> int:
    """Separate audio files with a trained model."""
    from unbraid.console import progress_bar
    from unbraid.separate_files import find_inputs, separate_files

    inputs = find_inputs(args.files, args.out)
    if inputs.passed_over:
        counts = ", ".join(f"{n} {reason}" for reason, n in inputs.passed_over.items())
        say(f"Passed over in folders: {counts}.", file=sys.stderr)

    # In a pipe standard output holds the paths of the separated files and nothing else.
    n_files = len(inputs.paths)
    problems = []
    with progress_bar("separating", n_files, quiet_in_pipe=True) as progress:
        progress(0, "loading the model")
        for n_done, result in enumerate(separate_files(inputs, args.model, args.out, trust=args.trust), 1):
            for path in result.outputs:
                progress.print_line(str(path))
            if result.problem:
                problems.append(result.problem)
            progress(n_done, f"{n_done} of {n_files} files")
    if len(problems) == 1 == n_files:
        raise UserError(problems[0])
    if problems:
        say(*(f"Skipped: {problem}" for problem in problems), file=sys.stderr)
        raise UserError(f"{len(problems)} of {n_files} files could not be separated; the others are in {args.out}.")
    return 0


def import_weights(args: argparse.Namespace) -> int:
    """Read a checkpoint of SpeechBrain, Asteroid or MSST (BS-RoFormer) as a model of Unbraid."""
    from unbraid.console import command_name
    from unbraid.importers import import_checkpoint

    recipe = import_checkpoint(args.files, args.out, sample_rate=args.sample_rate, overrides=args.set)
    say(
        f"{args.out} holds a {recipe.model.name} that returns {recipe.data.n_sources} source(s), at "
        f"{recipe.data.sample_rate} Hz."
    )
    say(f"Next: {command_name()} separate FILES -m {shlex.quote(str(args.out))} -o FOLDER")
    say(f"To train it further: init = {str(args.out.absolute())!r} in [model]")
    return 0


def bench(args: argparse.Namespace) -> int:
    """Measure training speed on this machine, and advise on precision, compiling and batch size."""
    from rich.console import Console

    from unbraid.bench import run_bench
    from unbraid.config.recipe import load_recipe
    from unbraid.console import progress_bar

    # The steps are timed on noise, but a recipe must name some data.
    recipe = load_recipe(find_recipe(args.recipe), ["data.path=.", *args.set])
    if args.json:
        result = run_bench(recipe, seconds=args.seconds)
        print(json.dumps(asdict(result), indent=1))
    else:
        with progress_bar("measuring", 1.0) as advance:
            result = run_bench(recipe, seconds=args.seconds, progress=advance)
        Console().print(result.table())
        say(result.advice.words)
    return exit_status(signal.SIGINT if result.stopped else 0)


def doctor(args: argparse.Namespace) -> int:
    """Diagnose a run from its records; the exit status is 0 for healthy, 1 for warnings, 2 for critical findings."""
    from unbraid.health.rules import exit_code, run_rules, summary
    from unbraid.health.series import read_series

    series = read_series(args.run, last=args.last)
    findings = run_rules(series, mute=args.mute)
    if args.json:
        table = {
            "run": str(args.run),
            "steps": series.last_step,
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(table, indent=1))
        return exit_code(findings)

    # A one-line summary, then each finding with its evidence and advice.
    shown = findings if args.all else findings[:N_FINDINGS]
    say(" ".join([f"{args.run}: {series.last_step} steps, {summary(findings)}.", *series.reading_notes]))
    for finding in shown:
        say("", f"{finding.severity.upper()} {finding.code}, steps {finding.steps[0]} to {finding.steps[1]}")
        say(f"  {finding.problem} {finding.evidence}")
        say(f"  {finding.advice}" + (f" [{finding.key}]" if finding.key else ""))
    if len(shown) < len(findings):
        say("", f"{len(findings) - len(shown)} more with --all.")
    return exit_code(findings)


N_FINDINGS = 3
"""Number of findings printed without --all, worst first: a long list would be ignored."""


def dashboard(args: argparse.Namespace) -> int:
    """Show runs on a live page in the browser; only this machine can reach it."""
    from unbraid.web.server import serve

    if args.open_to:
        say(
            f"Anyone who can reach {args.open_to} and has the link can read and hear these runs. The connection is not "
            "encrypted."
        )
    serve(args.runs, address=args.open_to or "127.0.0.1", port=args.port)
    return 0


def report(args: argparse.Namespace) -> int:
    """Write a run as one HTML file with curves, findings and audio; it needs no network."""
    from unbraid.web.report import write_report

    if args.plots:
        from unbraid.plots import draw_plots
        from unbraid.run_directory import RunDirectory

        for path in draw_plots(RunDirectory(args.run), args.plots):
            say(str(path))
    if args.out or not args.plots:
        say(str(write_report(args.run, args.out or args.run / "report.html")))
    return 0


def replay(args: argparse.Namespace) -> int:
    """Rerun a bad step to find the example, the layer, and a precision without the fault."""
    from unbraid.replay import replay as rerun

    for line in rerun(args.incident, trust=args.trust):
        say(line)
    return 0


def demo(args: argparse.Namespace) -> int:
    """Generate speakers, train on them, evaluate, and write separated audio and a picture."""
    from unbraid.console import print_summaries
    from unbraid.demo import run_demo, what_next

    result = run_demo(recipes_folder() / "demo.toml", args.out, overrides=args.set)
    if isinstance(result, int):
        return exit_status(result, "To resume, run the same command.")
    print_summaries(result.summaries, f"{result.n_items} mixtures of a low and a high voice, not used in training")
    say(*what_next(result))
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and their options."""
    top = Parser(prog="unbraid", description="Train source-separation networks.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"unbraid {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def add(name: str, function: object) -> argparse.ArgumentParser:
        # The docstring of a command is its help text, so the two cannot differ.
        text = (function.__doc__ or "").strip()
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(function=function, command=name)
        return command

    command = add("demo", demo)
    command.add_argument(
        "-o", "--out", type=Path, default=Path("runs/demo"), help="folder for all results (%(default)s)"
    )
    add_set(command)

    command = add("train", train)
    command.add_argument("recipe", type=Path, help="a TOML file, or the name of a built-in recipe")
    add_set(command)
    run_help = "run directory (runs/RECIPE); with torchrun write --run-dir, since torchrun takes --run for itself"
    command.add_argument("--run", "--run-dir", dest="run", type=Path, metavar="DIR", help=run_help)
    resume = command.add_mutually_exclusive_group()
    resume.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in the run directory")
    requeue_help = "resume if the run directory holds a run, else start one: for scripts that are queued again"
    resume.add_argument("--resume-if-present", action="store_true", help=requeue_help)

    command = add("evaluate", evaluate)
    command.add_argument("checkpoint", type=Path, help="a run directory or a checkpoint")
    command.add_argument("data", type=Path, nargs="?", help="speaker folder or manifest (as in training)")
    command.add_argument(
        "--split", default="test", choices=("train", "valid", "test"), help="speakers to evaluate on (%(default)s)"
    )
    command.add_argument("--n-items", type=positive(int), default=200, help="number of mixtures (%(default)s)")
    command.add_argument("--seconds", type=positive(float), help="length of a mixture in seconds (as in training)")
    command.add_argument(
        "--save-audio", type=positive(int), default=0, metavar="N", help="write audio of the first N mixtures"
    )
    worst_help = "write audio of the N mixtures with the lowest SI-SDRi"
    command.add_argument("--save-worst", type=positive(int), default=0, metavar="N", help=worst_help)
    command.add_argument("-o", "--out", type=Path, help="table to write, .csv or .parquet (evaluation.csv in the run)")
    add_trust(command)

    command = add("separate", separate)
    command.add_argument("files", type=Path, nargs="+", help="audio files of any rate and channel count, or folders")
    command.add_argument("-m", "--model", type=Path, required=True, help="a run directory or a checkpoint")
    command.add_argument("-o", "--out", type=Path, required=True, help="folder for NAME.source-N.wav")
    add_trust(command)

    command = add("import", import_weights)
    command.add_argument(
        "files", type=Path, nargs="+", help="the weights and their YAML file, or the folder that holds them"
    )
    command.add_argument("-o", "--out", type=Path, required=True, help="run directory to create")
    command.add_argument(
        "--sample-rate", type=positive(int), metavar="HZ", help="sample rate, if the files do not contain it"
    )
    add_set(command, "model.n_heads=8, if the files do not contain it")

    command = add("bench", bench)
    command.add_argument(
        "recipe",
        type=Path,
        nargs="?",
        default=Path("conv_tasnet_small"),
        help="a TOML file, or the name of a built-in recipe (%(default)s)",
    )
    add_set(command)
    seconds_help = "seconds of steps for each variant, after its first step (%(default)s)"
    command.add_argument("--seconds", type=positive(float), default=5.0, help=seconds_help)
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")

    command = add("doctor", doctor)
    command.add_argument("run", type=Path, help="a run directory, during the run or after it")
    command.add_argument("--all", action="store_true", help=f"print all findings, not just the {N_FINDINGS} worst")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--mute", action="append", default=[], metavar="CODE", help="ignore findings with this code")
    command.add_argument("--last", type=positive(int), metavar="N", help="look only at about the last N steps")

    command = add("dashboard", dashboard)
    command.add_argument(
        "runs", type=Path, nargs="*", default=[Path("runs")], help="run directories, or folders (runs)"
    )
    command.add_argument("--port", type=port_number, help="port to listen on (8642, or any free one)")
    open_help = "listen on another address than 127.0.0.1; anyone who can reach it and has the link can read these runs"
    command.add_argument("--open-to", metavar="ADDRESS", help=open_help)

    command = add("report", report)
    command.add_argument("run", type=Path, help="a run directory, during the run or after it")
    command.add_argument("-o", "--out", type=Path, help="HTML file to write (report.html in the run directory)")
    command.add_argument("--plots", type=Path, metavar="FOLDER", help="draw each curve as a PNG file instead")

    command = add("keys", keys)
    command.add_argument("table", nargs="?", help="only this table, such as optim")

    command = add("replay", replay)
    command.add_argument("incident", type=Path, help="a folder in the incidents of a run directory")
    add_trust(command)

    add_lab(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; a user error prints one line to stderr and returns 2."""
    argv = sys.argv[1:] if arguments is None else list(arguments)
    args, unknown = parser().parse_known_args(argv)
    if unknown:
        say(f"unbraid: {unknown_options(unknown, args)}", file=sys.stderr)
        return EXIT_USER_ERROR
    # Commands print it in their advice on how to resume.
    args.argv = argv
    try:
        return args.function(args)
    except UserError as error:
        # Some messages have several lines; the contract is one.
        say(f"unbraid: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        # Such as a full disk, or missing permissions: nothing a traceback would explain better.
        say(f"unbraid: {error}. Fix this, and run the command again.", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return exit_status(signal.SIGINT)
