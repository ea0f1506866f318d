"""`unbraid lab sharpness`."""

import argparse
from pathlib import Path

from unbraid.cli.options import Add, add_set, add_trust, file_to_write, positive
from unbraid.errors import EXIT_STOPPED


def sharpness(args: argparse.Namespace) -> int:
    """The largest eigenvalue of the Hessian, what it means for the learning rate, and the gradient noise scale."""
    from unbraid.console import progress_bar
    from unbraid.io import write_json
    from unbraid.lab.experiment import experiment_from_checkpoint
    from unbraid.lab.sharpness import describe, measure_sharpness
    from unbraid.signals import stop_on_signals

    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    subject = experiment_from_checkpoint(args.checkpoint, overrides=args.set, trust=args.trust)
    asked = {"n_items": args.items, "n_products": args.iterations, "split": args.split, "seed": args.seed}
    with stop_on_signals() as stop, progress_bar("multiplying", args.iterations) as advance:
        found = measure_sharpness(subject, **asked, stop=stop, progress=advance)
    print("\n".join(describe(found)))
    if args.out:
        write_json(args.out, found.as_json())
    return EXIT_STOPPED + found.signal if found.signal else 0


def add_sharpness(add: Add) -> None:
    """Add ``lab sharpness``."""
    command = add("sharpness", sharpness)
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder, or run directory")
    iterations_help = "products with the Hessian, at most (%(default)s)"
    command.add_argument("--iterations", type=positive(int), default=200, metavar="N", help=iterations_help)
    items_help = "mixtures that the loss is the mean of, 3 or more (%(default)s)"
    command.add_argument("--items", type=positive(int), default=32, metavar="N", help=items_help)
    command.add_argument("--split", choices=("train", "valid"), default="train", help="their talkers (%(default)s)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the vector to start from (%(default)s)")
    command.add_argument("-o", "--out", type=file_to_write, metavar="FILE", help="JSON file for the numbers")
    add_set(command, "data.path=FOLDER, where the recordings lie elsewhere")
    add_trust(command)
