"""`unbraid lab landscape`."""

import argparse
from pathlib import Path

from unbraid.cli.options import Add, add_set, add_trust, folder, positive
from unbraid.errors import EXIT_STOPPED


def landscape(args: argparse.Namespace) -> int:
    """The loss around a trained separator, on the way to another, or in the plane of a run's path."""
    from unbraid.plots import check_matplotlib

    check_matplotlib()
    from unbraid.console import progress_bar
    from unbraid.lab.experiment import experiment_from_checkpoint
    from unbraid.lab.landscape_run import choose_view, draw_landscape, output_folder, summary_lines
    from unbraid.signals import stop_on_signals

    experiment = experiment_from_checkpoint(args.checkpoint, overrides=args.set, trust=args.trust)
    run = args.checkpoint if args.plane else None
    out = output_folder(args.checkpoint, experiment, args.out)
    view = choose_view(experiment, other=args.to, run=run, span=args.span, n_points=args.points, seed=args.seed)
    of = {"n_items": args.items, "split": args.split}
    with stop_on_signals() as stop, progress_bar("taking the loss", len(view.points.coefficients)) as advance:
        found, plates = draw_landscape(experiment, view, out, **of, stop=stop, progress=advance)
    for line in summary_lines(found, plates, out, args.items):
        print(line)
    return EXIT_STOPPED + found.signal if found.signal else 0


def add_landscape(add: Add) -> None:
    """Add ``lab landscape``."""
    command = add("landscape", landscape)
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder, or run directory")
    where = command.add_mutually_exclusive_group()
    to_help = "on the straight line to another checkpoint of the same model, and how high the barrier between them is"
    where.add_argument("--to", type=Path, metavar="OTHER", help=to_help)
    plane_help = (
        "in the plane through the last checkpoint of the run directory CHECKPOINT, along the path's two principal axes"
    )
    where.add_argument("--plane", action="store_true", help=plane_help)
    points_help = "along each axis, odd where the model is in the middle (%(default)s)"
    command.add_argument("--points", type=int, default=21, metavar="N", help=points_help)
    span_help = "how far to go: in lengths of the filters (1), or as a share beyond the way or path (0.25)"
    command.add_argument("--span", type=positive(float), metavar="S", help=span_help)
    items_help = "mixtures that the loss is the mean of (%(default)s)"
    command.add_argument("--items", type=positive(int), default=16, metavar="N", help=items_help)
    command.add_argument("--split", choices=("train", "valid"), default="train", help="their talkers (%(default)s)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the directions (%(default)s)")
    out_help = "folder for all of it (landscape/RUN-STEP)"
    command.add_argument("-o", "--out", type=folder, metavar="DIR", help=out_help)
    add_set(command, "data.path=FOLDER, where the recordings lie elsewhere")
    add_trust(command)
