"""What a run looks like in a terminal: progress, tables; plain lines where there is no terminal."""

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from unbraid.records import Event, StepRecord, ValidationRecord

PLAIN_EVERY_SECONDS = 10.0


class Advance:
    """Moves a progress bar: ``advance(done, text)``, and says lines above it.

    Args:
        move: What to do with done and text.
        say: What to do with a line.
    """

    def __init__(self, move: Callable[[float, str], None], say: Callable[[str], None]) -> None:
        self.move, self.say = move, say

    def __call__(self, done: float, text: str = "") -> None:
        """So much is done, and this is what to say beside it."""
        self.move(done, text)


def program() -> str:
    """How unbraid was called, so that the commands it offers can be pasted."""
    if shutil.which("unbraid"):
        return "unbraid"
    called = Path(sys.argv[0])
    return f"{sys.executable} -m unbraid" if called.name == "__main__.py" else str(called)


@contextmanager
def progress_bar(title: str, total: float) -> Iterator[Advance]:
    """A bar in a terminal; in a file or pipe a plain line every ten seconds."""
    console = Console()
    if not console.is_terminal:
        yield _plain_lines(title, total)
        return
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=console) as progress:
        task = progress.add_task(title, total=total, text="")
        yield Advance(
            lambda done, text: progress.update(task, completed=done, text=text),
            lambda line: progress.console.print(line, markup=False, highlight=False),
        )


def _plain_lines(title: str, total: float) -> Advance:
    last = -PLAIN_EVERY_SECONDS

    def advance(done: float, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_SECONDS or done >= total:
            last = now
            print(f"{title} {100 * done / total:3.0f} %  {text}".rstrip(), flush=True)  # noqa: T201

    return Advance(advance, lambda line: print(line, flush=True))  # noqa: T201


def show_training(
    records: Iterable[StepRecord | ValidationRecord | Event],
    *,
    max_steps: int,
    max_minutes: float,
    title: str = "training",
    bulletin: Callable[[], str] | None = None,
) -> None:
    """Go through a training's records with a bar, and a line for each event and each validation.

    Args:
        records: The run; it moves on as it is gone through.
        max_steps: Its budget in steps; 0 for none.
        max_minutes: Its budget in minutes; 0 for none.
        title: Before the bar.
        bulletin: What is said after each validation, beside its result.
    """
    if os.environ.get("RANK", "0") != "0":  # one process of several tells
        deque(records, maxlen=0)
        return
    ticker = Ticker()
    with progress_bar(title, 1.0) as advance:
        for record in records:
            if isinstance(record, Event):
                advance.say(f"{record.code} at step {record.step}: {record.message}")
                continue
            ticker.add(record)
            if isinstance(record, ValidationRecord):
                parts = [f"step {record.step}", ticker.validation, *([bulletin()] if bulletin else [])]
                advance.say("  ".join(parts))
            by_time = record.elapsed_seconds / (60 * max_minutes) if max_minutes else 0.0
            by_steps = record.step / max_steps if max_steps else 0.0
            advance(min(1.0, max(by_time, by_steps)), ticker.text())


class Ticker:
    """The line beside a training's bar: means over the last steps that were trained, and counts of those left out."""

    def __init__(self) -> None:
        self.trained: deque[StepRecord] = deque(maxlen=50)
        self.n_skipped = self.n_all_filtered = 0
        self.validation = ""

    def add(self, record: StepRecord | ValidationRecord) -> None:
        """Hear of a step or a validation."""
        if isinstance(record, ValidationRecord):
            improvement = "none" if record.si_sdri is None else f"{record.si_sdri:+.2f} dB"
            self.validation = f"valid SI-SDRi {improvement}"
        elif record.trained:
            self.trained.append(record)
        elif record.outcome == "all_filtered":
            self.n_all_filtered += 1
        else:
            self.n_skipped += 1

    def text(self) -> str:
        """One line."""
        parts = []
        if self.trained:
            last = self.trained[-1]
            n = len(self.trained)
            norm = (
                last.grad_norm if last.clipped or last.clipped_grad_norm is None else last.clipped_grad_norm
            )  # as the limit saw it
            parts = [
                f"step {last.step}",
                f"loss {sum(r.loss or 0 for r in self.trained) / n:.2f}",
                f"norm {norm:.3g} limit {last.max_norm:.3g}",
                f"clipped {sum(r.clipped for r in self.trained) / n:.0%}",
                f"{sum(r.examples_per_second for r in self.trained) / n:.1f} ex/s",
            ]
        skips = f"skipped {self.n_skipped}" + (f", all filtered {self.n_all_filtered}" if self.n_all_filtered else "")
        return "  ".join([*parts, skips, *([self.validation] if self.validation else [])])


class Score(Protocol):
    """A mean with its standard error."""

    @property
    def mean(self) -> float:
        """In dB."""
        ...

    @property
    def standard_error(self) -> float:
        """Of the mean, in dB."""
        ...


def print_summaries(summaries: Mapping[str, Score], title: str) -> None:
    """A table of means and standard errors, in dB."""
    table = Table(title=title, title_justify="left")
    for name in summaries:
        table.add_column(_TITLES.get(name, name), justify="right")
    table.add_row(*(f"{score.mean:.2f} ± {score.standard_error:.2f} dB" for score in summaries.values()))
    Console().print(table)


_TITLES = {"si_sdr": "SI-SDR", "si_sdri": "SI-SDRi", "sdr": "SDR", "sdri": "SDRi"}
