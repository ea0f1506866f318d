"""Terminal output: progress bars, the status line of a training run, tables; plain lines where there is no terminal."""

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
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from unbraid.printable import printable, say
from unbraid.records import Event, StepRecord, ValidationRecord

PLAIN_INTERVAL_SECONDS = 10.0

METRIC_TITLES = {"si_sdr": "SI-SDR", "si_sdri": "SI-SDRi", "sdr": "SDR", "sdri": "SDRi"}


class ProgressBar:
    """A progress bar to call with the amount done and a text; also prints lines above the bar.

    Args:
        update: Called with the amount done and the text to show next to the bar.
        print_line: Called with a line to print above the bar.
    """

    def __init__(self, update: Callable[[float, str], None], print_line: Callable[[str], None]) -> None:
        self.update = update
        self.print_line = print_line

    def __call__(self, done: float, text: str = "") -> None:
        """Show the amount done, and a text next to the bar."""
        self.update(done, text)


def command_name() -> str:
    """Return the command by which unbraid was started, so that the commands it suggests can be pasted."""
    if shutil.which("unbraid"):
        return "unbraid"
    script = Path(sys.argv[0])
    return f"{sys.executable} -m unbraid" if script.name == "__main__.py" else str(script)


@contextmanager
def progress_bar(title: str, total: float, *, quiet_in_pipe: bool = False) -> Iterator[ProgressBar]:
    """Show a bar in a terminal; in a file or pipe, print a plain line every ten seconds unless ``quiet_in_pipe``."""
    console = Console()
    if not console.is_terminal:
        yield ProgressBar(lambda done, text: None, say) if quiet_in_pipe else _plain_progress(title, total)
        return
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=console) as progress:
        task = progress.add_task(title, total=total, text="")
        yield ProgressBar(
            lambda done, text: progress.update(task, completed=done, text=escape(printable(text))),
            # Without markup=False, a file name in square brackets would disappear.
            lambda line: progress.console.print(printable(line), markup=False, highlight=False),
        )


def _plain_progress(title: str, total: float) -> ProgressBar:
    last_time = -PLAIN_INTERVAL_SECONDS

    def update(done: float, text: str) -> None:
        nonlocal last_time
        now = time.monotonic()
        if now - last_time >= PLAIN_INTERVAL_SECONDS or done >= total:
            last_time = now
            say(f"{title} {100 * done / total:3.0f} %  {text}".rstrip())

    return ProgressBar(update, say)


def show_training(
    records: Iterable[StepRecord | ValidationRecord | Event],
    *,
    max_steps: int,
    max_minutes: float,
    title: str = "training",
    doctor_line: Callable[[], str] | None = None,
) -> None:
    """Consume the records of a training run; show a bar, and print a line for each event and each validation.

    Args:
        records: The run; iterating over it is what trains.
        max_steps: Its budget in steps; 0 for none.
        max_minutes: Its budget in minutes; 0 for none.
        title: Shown before the bar.
        doctor_line: Called after each validation for a text that is printed behind its result.
    """
    # With several processes only the first prints, but all must iterate, or the others would wait for them.
    if os.environ.get("RANK", "0") != "0":
        deque(records, maxlen=0)
        return
    status = TrainingStatus()
    with progress_bar(title, 1.0) as progress:
        for record in records:
            if isinstance(record, Event):
                progress.print_line(f"{record.code} at step {record.step}: {record.message}")
                continue
            status.add(record)
            if isinstance(record, ValidationRecord):
                line = f"step {record.step}  {status.validation}"
                progress.print_line(line if doctor_line is None else f"{line}  {doctor_line()}")
            share_of_time = record.elapsed_seconds / (60 * max_minutes) if max_minutes else 0.0
            share_of_steps = record.step / max_steps if max_steps else 0.0
            progress(min(1.0, max(share_of_time, share_of_steps)), status.text())


class TrainingStatus:
    """The text next to a training run's bar: means over the latest trained steps, and counts of skipped steps."""

    def __init__(self) -> None:
        self.trained: deque[StepRecord] = deque(maxlen=50)
        self.n_skipped = 0
        self.n_all_filtered = 0
        self.validation = ""

    def add(self, record: StepRecord | ValidationRecord) -> None:
        """Update the status with a step or a validation."""
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
        """Return the status in one line."""
        parts = []
        if self.trained:
            last = self.trained[-1]
            n = len(self.trained)
            # Show the norm that was compared with max_norm: transforms such as AGC change it before clipping.
            norm = last.grad_norm
            if not last.clipped and last.clipped_grad_norm is not None:
                norm = last.clipped_grad_norm
            parts = [
                f"step {last.step}",
                f"loss {sum(record.loss or 0 for record in self.trained) / n:.2f}",
                f"grad norm {norm:.3g} max {last.max_norm:.3g}",
                f"clipped {sum(record.clipped for record in self.trained) / n:.0%}",
                f"{sum(record.examples_per_second for record in self.trained) / n:.1f} examples/s",
            ]
        parts.append(
            f"skipped {self.n_skipped}" + (f", all filtered {self.n_all_filtered}" if self.n_all_filtered else "")
        )
        if self.validation:
            parts.append(self.validation)
        return "  ".join(parts)


class MeanWithError(Protocol):
    """A mean with its standard error, both in dB."""

    @property
    def mean(self) -> float:
        """The mean in dB."""
        ...

    @property
    def standard_error(self) -> float:
        """The standard error of the mean in dB."""
        ...


def print_summaries(summaries: Mapping[str, MeanWithError], title: str) -> None:
    """Print a table of the mean and standard error of each metric, in dB."""
    table = Table(title=escape(printable(title)), title_justify="left")
    for name in summaries:
        table.add_column(METRIC_TITLES.get(name, name), justify="right")
    table.add_row(*(f"{value.mean:.2f} ± {value.standard_error:.2f} dB" for value in summaries.values()))
    Console().print(table)
