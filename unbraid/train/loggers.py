"""Pass a run's records on to TensorBoard, Weights & Biases, trackio, or a custom logger."""

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
    """Receives every record, on the main process; ``close`` is called at the end, if there is one.

    It is constructed from the run directory and the resolved recipe, as plain dicts, before the first step.
    """

    def __call__(self, record: Record) -> None:
        """Log a step, a validation or an event."""
        ...


def scalars(record: StepRecord | ValidationRecord) -> dict[str, float]:
    """Return the curves' values of a record, by name: only those that are known and finite.

    A skipped step has no loss and no norm, but a 1 under ``skipped/`` and its reason.
    """
    if isinstance(record, ValidationRecord):
        named = {"valid/loss": record.loss, "valid/si_sdr": record.si_sdr, "valid/si_sdri": record.si_sdri}
        return _finite(named)
    always = {"train/lr": record.lr, "train/examples_per_second": record.examples_per_second}
    if not record.trained:
        return _finite({f"skipped/{record.outcome}": 1.0} | always)
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
        run: The run directory.
        recipe: Written as text.
    """

    def __init__(self, run: RunDirectory, recipe: Mapping[str, Any]) -> None:
        self.package = _package("tensorboard", "torch.utils.tensorboard", "tensorboardX")
        self.folder = run.path / "tensorboard"
        self.recipe = recipe
        self.writer: Any = None
        self.last_step = 0

    def __call__(self, record: Record) -> None:
        """Write a record."""
        # A run that went back to a checkpoint repeats steps: purge_step hides what was logged of them before.
        is_repeated = isinstance(record, StepRecord) and record.step <= self.last_step
        if self.writer is None or is_repeated:
            self.close()
            first = max(1, record.step) if isinstance(record, StepRecord) else record.step + 1
            self.writer = self.package.SummaryWriter(str(self.folder), purge_step=first, flush_secs=30)
            self.writer.add_text("recipe", "\n".join(f"    {line}" for line in _lines(self.recipe)), first)
        if isinstance(record, Event):
            self.writer.add_text("events", f"{record.code}: {record.message}", record.step)
            return
        self.last_step = record.step
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Flush and close."""
        if self.writer is not None:
            self.writer.close()


def _lines(table: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Yield a recipe's keys and values, one line each."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{where}{key}.")
        else:
            yield f"{where}{key} = {value!r}"


class WeightsAndBiases:
    """A run of Weights & Biases, in the project ``unbraid`` or that of ``WANDB_PROJECT``; ``WANDB_MODE`` is respected.

    The x-axis is our ``step``, because a resumed run is a new run there and would otherwise start from 0.

    Args:
        run: The run directory; files that are not uploaded yet are kept there.
        recipe: The config.
    """

    def __init__(self, run: RunDirectory, recipe: Mapping[str, Any]) -> None:
        project = os.environ.get("WANDB_PROJECT", "unbraid")
        folder = run.path.absolute()
        wandb = _package("wandb", "wandb")
        self.run = wandb.init(project=project, name=folder.name, dir=str(folder), config=dict(recipe))
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def __call__(self, record: Record) -> None:
        """Log a record; an event as text."""
        self.run.log({"step": record.step} | _as_dict(record))

    def close(self) -> None:
        """Finish the upload."""
        self.run.finish()


class Trackio:
    """A run of trackio, on this machine, in the project ``unbraid`` or that of ``TRACKIO_PROJECT``.

    Args:
        run: The run directory, which gives the name.
        recipe: The config.
    """

    def __init__(self, run: RunDirectory, recipe: Mapping[str, Any]) -> None:
        project = os.environ.get("TRACKIO_PROJECT", "unbraid")
        self.run = _package("trackio", "trackio").init(project, name=run.path.absolute().name, config=dict(recipe))

    def __call__(self, record: Record) -> None:
        """Log a record; an event as text."""
        self.run.log(_as_dict(record), step=record.step)

    def close(self) -> None:
        """Flush and close."""
        self.run.finish()


def _as_dict(record: Record) -> dict[str, Any]:
    if isinstance(record, Event):
        return {"event": f"{record.code}: {record.message}"}
    return {**scalars(record)}


LOGGERS: dict[str, Callable[..., Logger]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}


def _package(extra: str, *names: str) -> Any:
    """Import the first of several modules that is installed.

    Raises:
        UserError: If none is.
    """
    for name in names:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise UserError(f'train.also_log names {extra}, which is not installed. Run: pip install "unbraid[{extra}]".')


def open_loggers(
    makers: Mapping[str, Callable[..., Logger]], run: RunDirectory, recipe: Mapping[str, Any]
) -> dict[str, Logger]:
    """Construct the loggers that a recipe names.

    Args:
        makers: Constructors, by name.
        run: The run directory.
        recipe: The resolved recipe, as plain dicts.

    Raises:
        UserError: If one cannot be constructed; the earlier ones are closed.
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
        raise UserError(f"train.also_log: {name} could not start ({type(error).__name__}: {error}).") from error
    return opened


def forward_to_loggers(
    records: Generator[Record, None, None], loggers: Mapping[str, Logger], log: EventLog
) -> Generator[Record, None, None]:
    """Yield a run's records, each after every logger has received it. A logger that raises is dropped, with an event.

    Args:
        records: Of the run.
        loggers: By name.
        log: Where the event goes.
    """
    active = dict(loggers)
    step = 0
    try:
        with contextlib.closing(records):
            for record in records:
                step = record.step
                for name, logger in list(active.items()):
                    try:
                        logger(record)
                    except Exception as error:  # noqa: BLE001
                        del active[name]
                        _close(logger)
                        log.emit("LOGGER_FAILED", step, _failed(name, error))
                yield record
                yield from log.drain()
    finally:
        for name, logger in active.items():
            close_error = _close(logger)
            if close_error is not None:
                log.emit("LOGGER_FAILED", step, _failed(name, close_error))


def _close(logger: Logger) -> Exception | None:
    """Close a logger, if it can be closed, and return what it raised."""
    try:
        if hasattr(logger, "close"):
            logger.close()
    except Exception as error:  # noqa: BLE001
        return error
    return None


def _failed(name: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else "no reason given"
    return f"The logger {name} raised {type(error).__name__}: {reason}. It is dropped, and the run continues."
