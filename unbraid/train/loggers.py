"""What a run says, passed on to other people's loggers: TensorBoard, Weights & Biases, trackio, or one's own."""

import contextlib
import importlib
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Protocol

from unbraid.errors import UserError
from unbraid.records import Event, StepRecord, ValidationRecord
from unbraid.run_directory import RunDirectory
from unbraid.train.event_log import EventLog, Record


class Logger(Protocol):
    """Hears every record, on the main process; where it has ``close``, that is called at the end.

    It is made from the run directory and the resolved recipe, as plain dicts, before the first step.
    """

    def __call__(self, record: Record) -> None:
        """Hear of a step, a validation or an event."""
        ...


def numbers_of(record: StepRecord | ValidationRecord) -> dict[str, float]:
    """What is drawn of a record, by name: only what is known and finite.

    A step that was left out has no loss and no norm, but a 1 under ``left_out/`` and the reason.
    """
    if isinstance(record, ValidationRecord):
        named = {"valid/loss": record.loss, "valid/si_sdr": record.si_sdr, "valid/si_sdri": record.si_sdri}
        return _finite(named)
    always = {"train/lr": record.lr, "train/examples_per_second": record.examples_per_second}
    if not record.trained:
        return _finite({f"left_out/{record.outcome}": 1.0} | always)
    known = [value for value in record.si_sdr if value is not None]
    named = {
        "train/loss": record.loss,
        "train/grad_norm": record.grad_norm,
        "train/max_norm": record.max_norm,
        "train/clipped_grad_norm": record.clipped_grad_norm,
        "train/si_sdr": sum(known) / len(known) if known else None,
    }
    return _finite(named | always)


def _finite(named: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in named.items() if value is not None and math.isfinite(value)}


class TensorBoard:
    """Event files in the folder ``tensorboard`` of the run directory.

    Args:
        run: Where.
        recipe: Written as text.
    """

    def __init__(self, run: RunDirectory, recipe: Mapping[str, Any]) -> None:
        self.package = _package("tensorboard", "torch.utils.tensorboard", "tensorboardX")
        self.folder, self.recipe = run.path / "tensorboard", recipe
        self.writer: Any = None
        self.last = 0

    def __call__(self, record: Record) -> None:
        """Write a record; what an earlier way past its step left is taken back."""
        again = isinstance(record, StepRecord) and record.step <= self.last
        if self.writer is None or again:
            self.close()
            first = max(1, record.step) if isinstance(record, StepRecord) else record.step + 1
            self.writer = self.package.SummaryWriter(str(self.folder), purge_step=first, flush_secs=30)
            self.writer.add_text("recipe", "\n".join(f"    {line}" for line in _lines(self.recipe)), first)
        if isinstance(record, Event):
            self.writer.add_text("events", f"{record.code}: {record.message}", record.step)
            return
        self.last = record.step
        for name, value in numbers_of(record).items():
            self.writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Write out what is still held."""
        if self.writer is not None:
            self.writer.close()


def _lines(table: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """A recipe's keys and values, a line each."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{where}{key}.")
        else:
            yield f"{where}{key} = {value!r}"


class WeightsAndBiases:
    """A run of Weights & Biases, in the project ``unbraid`` or that of ``WANDB_PROJECT``; ``WANDB_MODE`` counts.

    Steps are its own number ``step``: what is resumed is another run there, and goes on at the step it begins with.

    Args:
        run: Where what is not sent lies.
        recipe: Its config.
    """

    def __init__(self, run: RunDirectory, recipe: Mapping[str, Any]) -> None:
        project = os.environ.get("WANDB_PROJECT", "unbraid")
        name, folder = run.path.absolute().name, str(run.path.absolute())
        self.run = _package("wandb", "wandb").init(project=project, name=name, dir=folder, config=dict(recipe))
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def __call__(self, record: Record) -> None:
        """Log a record; an event as text."""
        said = {"event": f"{record.code}: {record.message}"} if isinstance(record, Event) else numbers_of(record)
        self.run.log({"step": record.step} | said)

    def close(self) -> None:
        """Send what is still held."""
        self.run.finish()


class Trackio:
    """A run of trackio, on this machine, in the project ``unbraid`` or that of ``TRACKIO_PROJECT``.

    Args:
        run: What its name is taken from.
        recipe: Its config.
    """

    def __init__(self, run: RunDirectory, recipe: Mapping[str, Any]) -> None:
        project = os.environ.get("TRACKIO_PROJECT", "unbraid")
        self.run = _package("trackio", "trackio").init(project, name=run.path.absolute().name, config=dict(recipe))

    def __call__(self, record: Record) -> None:
        """Log a record; an event as text."""
        said = {"event": f"{record.code}: {record.message}"} if isinstance(record, Event) else numbers_of(record)
        self.run.log(said, step=record.step)

    def close(self) -> None:
        """Write out what is still held."""
        self.run.finish()


LOGGERS: dict[str, Callable[..., Logger]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}


def _package(extra: str, *names: str) -> Any:
    """The first of some modules that is there.

    Raises:
        UserError: If none is.
    """
    for name in names:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise UserError(f'train.also_log names {extra}, which is not installed: pip install "unbraid[{extra}]".')


def open_loggers(
    makers: Mapping[str, Callable[..., Logger]], run: RunDirectory, recipe: Mapping[str, Any]
) -> dict[str, Logger]:
    """The loggers that a recipe names, before the first step.

    Args:
        makers: What makes each of them.
        run: The run directory.
        recipe: The resolved recipe, as plain dicts.

    Raises:
        UserError: If one cannot be made; those made before it are closed.
    """
    opened: dict[str, Logger] = {}
    try:
        for name, make in makers.items():
            opened[name] = make(run, recipe)
    except Exception as error:
        for logger in opened.values():
            _close(logger)
        if isinstance(error, UserError):
            raise
        raise UserError(f"train.also_log: {name} could not begin ({type(error).__name__}: {error}).") from error
    return opened


def forward_to_loggers(
    records: Generator[Record, None, None], loggers: Mapping[str, Logger], log: EventLog
) -> Generator[Record, None, None]:
    """A run's records, each after every logger has heard it; one that raises is told of once, and then left out.

    Args:
        records: The run.
        loggers: By name.
        log: Where it is told.
    """
    audio_options = dict(loggers)
    step = 0
    try:
        with contextlib.closing(records):
            for record in records:
                step = record.step
                for name, logger in [*audio_options.items()]:
                    try:
                        logger(record)
                    except Exception as error:  # noqa: BLE001
                        del audio_options[name]
                        _close(logger)
                        log.emit("LOGGER_FAILED", step, _failed(name, error))
                yield record
                yield from log.drain()
    finally:
        for name, logger in audio_options.items():
            if (refused := _close(logger)) is not None:
                log.emit("LOGGER_FAILED", step, _failed(name, refused))


def _close(logger: Logger) -> Exception | None:
    """Close it, where it can be; what it raised."""
    try:
        if hasattr(logger, "close"):
            logger.close()
    except Exception as error:  # noqa: BLE001
        return error
    return None


def _failed(name: str, error: Exception) -> str:
    said = str(error).splitlines()[0] if str(error) else "no reason given"
    return f"The logger {name} raised {type(error).__name__}: {said}. It hears no more; the run goes on."
