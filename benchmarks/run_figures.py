"""Write the figures of a finished run and of its evaluation as JSON: python benchmarks/run_figures.py RUN TABLE OUT.

The README and the docs quote them. Steps per second is the median over all trained steps after the first fifty, with
the time spent waiting for data.
"""

import argparse
import csv
import json
import os
import statistics
from datetime import UTC, datetime
from pathlib import Path

from machine import processor

from unbraid.build import load_model
from unbraid.evaluate import summarise
from unbraid.records import read_rows, read_steps
from unbraid.run_directory import RunDirectory


def main() -> None:
    """Read the run and write its figures."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("run", type=Path)
    arguments.add_argument("table", type=Path, help="evaluation.csv")
    arguments.add_argument("out", type=Path, help="JSON to write")
    arguments.add_argument("--seconds", type=float, help="wall time of the whole command, if it is to be quoted")
    args = arguments.parse_args()
    figures = run_figures(args.run, args.table) | ({"command_seconds": args.seconds} if args.seconds else {})
    args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


def run_figures(run: Path, table: Path) -> dict[str, object]:
    """Return everything that the docs quote from a run."""
    steps = [record for record in read_steps(RunDirectory(run).steps) if record.trained]
    validation = read_rows(RunDirectory(run).validation)[0]
    with table.open(newline="", encoding="utf-8") as file:
        table_rows = list(csv.DictReader(file))
    rows = [{k: float(v) if v else None for k, v in row.items() if k != "files"} for row in table_rows]
    model, recipe = load_model(run)
    environment = json.loads(RunDirectory(run).environment.read_text())
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, torch {environment['torch']}",
        "precision": environment["chosen"]["precision"],
        "model": recipe.model.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps[-1].step,
        "batch_size": recipe.data.batch_size,
        "steps_per_second": round(1 / statistics.median(r.seconds + r.data_seconds for r in steps[50:]), 2),
        "training_minutes": round(steps[-1].elapsed_seconds / 60, 2),
        "left_out": len(read_rows(RunDirectory(run).steps)[0]) - len(steps),
        "clipped": round(sum(r.clipped for r in steps) / len(steps), 3),
        "validation_si_sdri": [round(row["si_sdri"], 2) for row in validation],
        "test_items": len(rows),
        "test": {name: [round(s.mean, 2), round(s.standard_error, 2)] for name, s in summarise(rows).items()},
    }


if __name__ == "__main__":
    main()
