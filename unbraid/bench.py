"""Time a recipe's training steps on this machine: in each precision, compiled or not, at several batch sizes."""

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

BATCH_SIZE_FACTORS = (1, 2, 4)
"""Factors on the recipe's batch size."""


@dataclass(frozen=True)
class Bench:
    """Result of `run_bench`.

    Attributes:
        model: Name of the model in the recipe.
        excerpt: Length and sample rate of an example.
        device: Name of the device.
        rows: The measurements, in the order in which they were made.
        advice: The variant to use.
        stopped: Whether it was interrupted, so that rows are missing.
    """

    model: str
    excerpt: str
    device: str
    rows: tuple[BenchRow, ...]
    advice: Advice
    stopped: bool

    def table(self) -> Table:
        """Return a table for the terminal, with the advised row in bold."""
        notes = "\n".join(f"{row.variant.words}: {row.note}" for row in self.rows if row.note)
        title = f"{self.model}, {self.excerpt}, on {self.device}"
        left_justified: Any = {"title_justify": "left", "caption_justify": "left"}
        table = Table(title=title, caption=notes, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), **left_justified)
        for name in ("precision", "compiled", "batch", "ex/s", "ms/step", "memory", "1st step", ""):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            is_advised = self.advice.take == keys_of(row.variant)
            table.add_row(*_cells(row), "use" if is_advised else "", style="bold" if is_advised else None)
        return table


def run_bench(
    recipe: Recipe, *, seconds: float = 5.0, progress: Callable[[float, str], None] = lambda _done, _text: None
) -> Bench:
    """Measure every variant in its own process; an interrupt (Ctrl-C) ends it with the rows measured so far.

    Args:
        recipe: Its model, loss, optimizer and clipper are timed; no data are needed.
        seconds: Seconds of steps for each variant, after its first step, which compiling can make long.
        progress: Called with the share that is done, and the variant that is being measured.

    Raises:
        UserError: If the recipe cannot be used.
    """
    device = choose_device()
    to_measure = variants(recipe, device)
    rows: list[BenchRow] = []
    stopped = False
    try:
        for index, variant in enumerate(to_measure):
            progress(index / len(to_measure), variant.words)
            if variant.batch_size == recipe.data.batch_size or fits(variant, rows, device):
                rows.append(measure_in_subprocess(recipe, variant, seconds))
        progress(1.0, "")
    except KeyboardInterrupt:
        stopped = True
    excerpt = f"{recipe.data.excerpt_seconds:g} s at {recipe.data.sample_rate} Hz"
    advice = advise(rows, recipe)
    if stopped:
        advice = replace(advice, words=f"Interrupted; advice from these rows only: {advice.words}")
    return Bench(recipe.model.name, excerpt, _device_name(device), tuple(rows), advice, stopped)


def variants(recipe: Recipe, device: torch.device) -> list[Variant]:
    """Return the variants to measure, the recipe's own batch size first.

    Built-in models without ``compile_regions`` are not compiled; a custom model is measured both ways.
    """
    if device.type == "cuda":
        precisions = ["fp32", *(["bf16"] if best_precision(device) == "bf16" else []), "fp16"]
    else:
        precisions = list(dict.fromkeys(["fp32", best_precision(device)]))
    builtin = MODELS.get(recipe.model.name)
    compiled = (False, True) if builtin is None or hasattr(builtin, "compile_regions") else (False,)
    sizes = [factor * recipe.data.batch_size for factor in BATCH_SIZE_FACTORS]
    return [Variant(p, c, size) for size, p, c in product(sizes, precisions, compiled)]


def fits(variant: Variant, rows: Sequence[BenchRow], device: torch.device) -> bool:
    """Return whether to try a larger batch: half of it was measured, and twice its memory is available."""
    half = replace(variant, batch_size=variant.batch_size // 2)
    smaller = next((row for row in rows if row.variant == half), None)
    if smaller is None or smaller.peak_memory_bytes is None:
        return False
    # A GPU reports that memory ran out. On a CPU the system may kill the process, or others.
    return device.type == "cuda" or 2 * smaller.peak_memory_bytes < available_memory()


def available_memory() -> float:
    """Return the bytes of memory that are available; infinity if the system does not report them."""
    try:
        rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    # The unit is kB, as in "MemAvailable:   12345678 kB".
    return next((1024.0 * int(row.split()[1]) for row in rows if row.startswith("MemAvailable")), math.inf)


def measure_in_subprocess(recipe: Recipe, variant: Variant, seconds: float) -> BenchRow:
    """Measure in a new process, where nothing was compiled or allocated before; if memory runs out, only it ends."""
    with tempfile.TemporaryDirectory() as compile_cache:
        return _run_child(recipe, variant, seconds, Path(compile_cache))


def _run_child(recipe: Recipe, variant: Variant, seconds: float, compile_cache: Path) -> BenchRow:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_measure_and_send, args=(sender, recipe, variant, seconds, compile_cache), daemon=True
    )
    _start_ignoring_interrupts(child)
    # Without closing this end, recv() would wait for ever for a child that was killed.
    sender.close()
    try:
        row: BenchRow | str = receiver.recv()
    except EOFError:
        child.join()
        # Linux ends a process with SIGKILL when memory runs out.
        killed = child.exitcode == -signal.SIGKILL
        row = BenchRow(variant, note="out of memory" if killed else f"ended with status {child.exitcode}")
    finally:
        child.kill()
        child.join()
        receiver.close()
    # A string is the message of a user error in the child.
    if isinstance(row, str):
        raise UserError(row)
    return row


def _start_ignoring_interrupts(child: Any) -> None:
    """Start a process that ignores Ctrl-C, which the terminal sends to both; this process then ends the child."""
    # Python allows only the main thread to set a signal handler.
    if threading.current_thread() is not threading.main_thread():
        child.start()
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child.start()
    finally:
        signal.signal(signal.SIGINT, previous)


def _measure_and_send(
    sender: Connection, recipe: Recipe, variant: Variant, seconds: float, compile_cache: Path
) -> None:
    # An empty cache: compiling takes as long as in the first run on a machine.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compile_cache)
    try:
        sender.send(measure(recipe, variant, seconds=seconds))
    except UserError as error:
        sender.send(str(error))


def measure(recipe: Recipe, variant: Variant, *, seconds: float) -> BenchRow:
    """Train on noise for some seconds in this process, as a run of the recipe would, and measure it.

    Args:
        recipe: The recipe; model and state are built by the same functions as for training.
        variant: Precision, compiling and batch size to use instead of the recipe's.
        seconds: Seconds of steps after the first one; there is at least one.

    Raises:
        UserError: If the recipe cannot be used.
    """
    # Build the model and the training state.
    device = choose_device()
    began = perf_counter()
    model = build_model(recipe).to(device)
    if variant.compiled:
        if missing := missing_build_tools(device):
            return BenchRow(variant, note=f"{missing}, but compiling needs it")
        compile_model(model, device)
    state = build_state(recipe, model, precision=variant.precision)
    micro_batches = [
        micro_batch.to(device) for micro_batch in noise(recipe, variant.batch_size).split(recipe.train.accumulate)
    ]

    # Train.
    ends: list[float] = []
    faults: set[str] = set()
    try:
        for record in steps(state, micro_batches):
            ends.append(perf_counter())
            faults |= {record.outcome} & set(FAULT_OUTCOMES)
            if "out_of_memory" in faults or (len(ends) > 1 and ends[-1] - ends[0] >= seconds):
                break
    except (RuntimeError, MemoryError) as error:
        return BenchRow(variant, note=_error_note(error))

    # Steps with a fault skip the update, so their speed would be wrong.
    if faults:
        return BenchRow(variant, note=", ".join(sorted(faults)).replace("_", " "))
    durations = [after - before for before, after in pairwise(ends)]
    # The second step still allocates memory, so it counts only if there is no other.
    step_seconds = statistics.median(durations[1:] or durations)
    return BenchRow(
        variant,
        examples_per_second=variant.batch_size / step_seconds,
        step_seconds=step_seconds,
        peak_memory_bytes=peak_memory(device),
        first_step_seconds=ends[0] - began,
        note=""
        if state.n_pieces == 1
        else f"in {state.n_pieces} pieces, because memory is too small for the whole batch",
    )


def noise(recipe: Recipe, batch_size: int) -> Batch:
    """Return a batch of noise with the size and level of the recipe's examples."""
    rng = torch.Generator().manual_seed(recipe.data.seed)
    sources = torch.randn(batch_size, recipe.data.n_sources, 1, recipe.data.n_samples, generator=rng)
    sources *= db_to_amplitude(recipe.data.level_db)
    return Batch.from_tensors(sources.sum(1), sources)


def steps(state: TrainState, micro_batches: Sequence[Batch]) -> Iterator[StepRecord]:
    """Train on the same micro-batches for ever; on an accelerator launch each step before the last one is finished."""
    n_ahead = 1 if state.device.type == "cuda" and state.on_bad_example == "skip" else 0
    launched: list[LaunchedStep] = []
    while True:
        launched.append(launch(state, micro_batches))
        if len(launched) > n_ahead:
            finished = finish(state, launched.pop(0))
            if finished is None:
                # Memory ran out. All steps are on the same batch, so launching again repeats them.
                launched.clear()
                continue
            yield finished[0]


def _cells(row: BenchRow) -> list[str]:
    variant = row.variant
    cells = [variant.precision, "yes" if variant.compiled else "no", str(variant.batch_size)]
    if row.examples_per_second is None:
        return [*cells, "-", "-", "-", "-"]
    step_ms = short(1000 * (row.step_seconds or 0))
    memory = f"{(row.peak_memory_bytes or 0) / 2**30:.2f} GiB"
    return [*cells, rate_of(row), step_ms, memory, f"{row.first_step_seconds:.1f} s"]


def _error_note(error: BaseException) -> str:
    """Return an error as a short note."""
    # torch raises a plain RuntimeError when memory runs out on the CPU; its text differs between allocators.
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text or "not enough memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {(text.splitlines() or ['no message'])[0][:200]}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, threads: {torch.get_num_threads()})"
