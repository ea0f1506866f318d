"""A recipe's training steps timed on this machine: in each precision, compiled or not, in batches of several sizes."""

import math
import multiprocessing
import os
import platform
import signal
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from unbraid.bench_advice import Advice, BenchRow, Variant, advise, keys_of, rate_of, short
from unbraid.build import build_model, build_state, choose_device
from unbraid.compilation import compile_model, missing_build_tools
from unbraid.config.recipe import Recipe
from unbraid.data.batch import Batch
from unbraid.dsp import db_to_amplitude
from unbraid.errors import UserError
from unbraid.models import MODELS
from unbraid.records import FAULT_OUTCOMES, StepRecord
from unbraid.robust.precision import best_precision
from unbraid.train.memory import peak_memory
from unbraid.train.state import TrainState
from unbraid.train.step import LaunchedStep, finish, launch

TIMES = (1, 2, 4)
"""The recipe's batch size, and multiples of it."""


@dataclass(frozen=True)
class Bench:
    """All that was measured.

    Attributes:
        model: Its name in the recipe.
        excerpt: Length and rate of an example.
        device: Where.
        rows: In the order in which they were measured.
        advice: What follows.
        stopped: Whether it was interrupted: there may be more to know.
    """

    model: str
    excerpt: str
    device: str
    rows: tuple[BenchRow, ...]
    advice: Advice
    stopped: bool

    def table(self) -> Table:
        """For a terminal; the row that is advised stands out."""
        notes = "\n".join(f"{row.variant.words}: {row.note}" for row in self.rows if row.note)
        title = f"{self.model}, {self.excerpt}, on {self.device}"
        left: Any = {"title_justify": "left", "caption_justify": "left"}
        table = Table(title=title, caption=notes, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), **left)
        for name in ("precision", "compiled", "batch", "ex/s", "ms/step", "memory", "1st step", ""):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            chosen = self.advice.take == keys_of(row.variant)
            table.add_row(*_cells(row), "take" * chosen, style="bold" if chosen else None)
        return table


def run_bench(
    recipe: Recipe, *, seconds: float = 5.0, progress: Callable[[float, str], None] = lambda _done, _text: None
) -> Bench:
    """Measure every variant, each in a fresh process; an interrupt (Ctrl-C) ends it with what is known by then.

    Args:
        recipe: Its model, loss, optimizer and clipper are what is timed; no data are needed.
        seconds: Of steps for each variant, beside its first one, which compiling can make long.
        progress: Called with the share that is done, and what is under way.

    Raises:
        UserError: If the recipe cannot be used.
    """
    device = choose_device()
    asked = variants(recipe, device)
    rows, stopped = list[BenchRow](), False
    try:
        for place, variant in enumerate(asked):
            progress(place / len(asked), variant.words)
            if variant.batch_size == recipe.data.batch_size or fits(variant, rows, device):
                rows.append(in_a_fresh_process(recipe, variant, seconds))
        progress(1.0, "")
    except KeyboardInterrupt:
        stopped = True
    excerpt = f"{recipe.data.excerpt_seconds:g} s at {recipe.data.sample_rate} Hz"
    advice = advise(rows, recipe)
    if stopped:
        advice = replace(advice, words=f"Interrupted; of these rows alone: {advice.words}")
    return Bench(recipe.model.name, excerpt, _device_name(device), tuple(rows), advice, stopped)


def variants(recipe: Recipe, device: torch.device) -> list[Variant]:
    """All that the device can, the recipe's own batch size first; compiled where a model of ours is made for it."""
    if device.type == "cuda":
        precisions = ["fp32", *(["bf16"] if best_precision(device) == "bf16" else []), "fp16"]
    else:
        precisions = list(dict.fromkeys(["fp32", best_precision(device)]))
    ours = MODELS.get(recipe.model.name)
    compiled = (False, True) if ours is None or hasattr(ours, "compile_regions") else (False,)
    sizes = [times * recipe.data.batch_size for times in TIMES]
    return [Variant(*one) for one in ((p, c, size) for size, p, c in product(sizes, precisions, compiled))]


def fits(variant: Variant, rows: Sequence[BenchRow], device: torch.device) -> bool:
    """Whether a larger batch is worth a try: half of it could be measured, and twice that memory is there."""
    half = replace(variant, batch_size=variant.batch_size // 2)
    smaller = next((row for row in rows if row.variant == half), None)
    if smaller is None or smaller.peak_memory_bytes is None:
        return False
    return device.type == "cuda" or 2 * smaller.peak_memory_bytes < available_memory()


def available_memory() -> float:
    """Bytes that the machine could still give away; without end where it does not tell."""
    try:
        rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(row.split()[1]) for row in rows if row.startswith("MemAvailable")), math.inf)


def in_a_fresh_process(recipe: Recipe, variant: Variant, seconds: float) -> BenchRow:
    """Measure where nothing was compiled, allocated or crashed before; if memory runs out, only this process ends."""
    with tempfile.TemporaryDirectory() as made:
        return _in_a_child(recipe, variant, seconds, Path(made))


def _in_a_child(recipe: Recipe, variant: Variant, seconds: float, made: Path) -> BenchRow:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_and_send, args=(sender, recipe, variant, seconds, made), daemon=True)
    _start_deaf(child)
    sender.close()
    try:
        row: BenchRow | str = receiver.recv()
    except EOFError:
        child.join()
        killed = child.exitcode == -signal.SIGKILL
        row = BenchRow(variant, note="out of memory" if killed else f"ended with status {child.exitcode}")
    finally:
        child.kill()
        child.join()
        receiver.close()
    if isinstance(row, str):
        raise UserError(row)
    return row


def _start_deaf(child: Any) -> None:
    """Start a process that an interrupt from the keyboard does not reach: this one hears it, and ends the other."""
    if threading.current_thread() is not threading.main_thread():
        child.start()
        return
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child.start()
    finally:
        signal.signal(signal.SIGINT, heard)


def _measure_and_send(sender: Connection, recipe: Recipe, variant: Variant, seconds: float, made: Path) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(made)
    try:
        sender.send(measure(recipe, variant, seconds=seconds))
    except UserError as error:
        sender.send(str(error))


def measure(recipe: Recipe, variant: Variant, *, seconds: float) -> BenchRow:
    """Train on noise for a while, in this process, as a run by the recipe would.

    Args:
        recipe: Built by the same functions as for training.
        variant: Instead of what the recipe says.
        seconds: Of steps after the first; at least one more is made.

    Raises:
        UserError: If the recipe cannot be used.
    """
    device = choose_device()
    began = perf_counter()
    model = build_model(recipe).to(device)
    if variant.compiled:
        if absent := missing_build_tools(device):
            return BenchRow(variant, note=f"{absent}, which compiling needs")
        compile_model(model, device)
    state = build_state(recipe, model, precision=variant.precision)
    parts = [part.to(device) for part in noise(recipe, variant.batch_size).split(recipe.train.accumulate)]
    ends, wrong = list[float](), set[str]()
    try:
        for record in steps(state, parts):
            ends.append(perf_counter())
            wrong |= {record.outcome} & set(FAULT_OUTCOMES)
            if "out_of_memory" in wrong or (len(ends) > 1 and ends[-1] - ends[0] >= seconds):
                break
    except (RuntimeError, MemoryError) as error:
        return BenchRow(variant, note=_said(error))
    if wrong:  # the speed would be that of steps that do not train
        return BenchRow(variant, note=", ".join(sorted(wrong)).replace("_", " "))
    taken = [after - before for before, after in pairwise(ends)]
    step_seconds = statistics.median(taken[1:] or taken)  # the second step still makes room for itself
    return BenchRow(
        variant,
        examples_per_second=variant.batch_size / step_seconds,
        step_seconds=step_seconds,
        peak_memory_bytes=peak_memory(device),
        first_step_seconds=ends[0] - began,
        note="" if state.n_pieces == 1 else f"in {state.n_pieces} pieces, as memory does not do for the whole",
    )


def noise(recipe: Recipe, batch_size: int) -> Batch:
    """A batch of the right size and level."""
    rng = torch.Generator().manual_seed(recipe.data.seed)
    sources = torch.randn(batch_size, recipe.data.n_sources, 1, recipe.data.n_samples, generator=rng)
    sources *= db_to_amplitude(recipe.data.level_db)
    return Batch.from_tensors(sources.sum(1), sources)


def steps(state: TrainState, parts: Sequence[Batch]) -> Iterator[StepRecord]:
    """Steps without end on the same micro-batches; on an accelerator one is launched before the last is finished."""
    ahead = 1 if state.device.type == "cuda" and state.on_bad_example == "skip" else 0
    under_way: list[LaunchedStep] = []
    while True:
        under_way.append(launch(state, parts))
        if len(under_way) > ahead:
            finished = finish(state, under_way.pop(0))
            if finished is None:  # memory ran out: all steps are on the same batch, so launching again repeats them
                under_way.clear()
                continue
            yield finished[0]


def _cells(row: BenchRow) -> list[str]:
    variant = row.variant
    cells = [variant.precision, "yes" if variant.compiled else "no", str(variant.batch_size)]
    if row.examples_per_second is None:
        return [*cells, "-", "-", "-", "-"]
    figures = [rate_of(row), short(1000 * (row.step_seconds or 0))]
    memory = f"{(row.peak_memory_bytes or 0) / 2**30:.2f} GiB"
    return [*cells, *figures, memory, f"{row.first_step_seconds:.1f} s"]


def _said(error: BaseException) -> str:
    """What an error says, in a few words."""
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text or "not enough memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {(text.splitlines() or ['no reason given'])[0][:200]}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, threads: {torch.get_num_threads()})"
