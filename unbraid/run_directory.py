"""The run directory: the names of its files, and the lock that lets one process write to it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from unbraid.errors import CheckpointError


@dataclass(frozen=True)
class RunDirectory:
    """The file names of a run directory. Files are the only thing that the parts of unbraid share about a run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, TOML."""
        return self.path / "recipe.toml"

    @property
    def environment(self) -> Path:
        """Versions, device, threads, what "auto" chose, and whether the loss is in dB; JSON."""
        return self.path / "environment.json"

    @property
    def data(self) -> Path:
        """Counts of training and validation files and speakers, and which of them are in both; JSON."""
        return self.path / "data.json"

    @property
    def lock(self) -> Path:
        """Locked by the one process that may write to the directory; holds its process number."""
        return self.path / "lock"

    @property
    def steps(self) -> Path:
        """One `StepRecord` per line."""
        return self.path / "steps.jsonl"

    @property
    def validation(self) -> Path:
        """One `ValidationRecord` per line."""
        return self.path / "validation.jsonl"

    @property
    def events(self) -> Path:
        """One `Event` per line."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folders ``step-NNNNNN``, and the small text files ``best`` and ``last`` that name one of them."""
        return self.path / "checkpoints"

    @property
    def incidents(self) -> Path:
        """Folders with everything that `unbraid replay` needs to rerun a bad step."""
        return self.path / "incidents"

    @property
    def audio(self) -> Path:
        """Audio of the first validation examples, and folders ``step-NNNNNN`` with their estimates."""
        return self.path / "audio"

    @property
    def logs(self) -> tuple[Path, Path, Path]:
        """The files of JSON lines. A resumed run truncates them to the length recorded in its checkpoint."""
        return self.steps, self.validation, self.events


@contextmanager
def run_directory_lock(run: RunDirectory) -> Iterator[None]:
    """Hold the lock of the run directory, so that two runs never write to one.

    The operating system releases the lock when the process ends, however it ends. A run that is refused before it
    writes anything leaves nothing behind, neither the lock nor the folders made for it.

    Raises:
        CheckpointError: If another process holds it, or the directory cannot be created.
    """
    new_folders = [path for path in (run.path, *run.path.parents) if not path.exists()]
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"The run directory {run.path} cannot be created ({error.strerror}). Give another one with --run."
        ) from error
    # "a+" and not "w": opening must not erase the process number of a run that holds the lock.
    with run.lock.open("a+", encoding="utf-8") as file:
        try:
            _lock(file.fileno())
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise CheckpointError(
                f"Another run (process {owner}) is writing to {run.path}. Wait for it to end, or give another "
                "directory with --run."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            if not run.recipe.exists():
                _remove_unused(run.lock, new_folders)


def _remove_unused(lock: Path, folders: Sequence[Path]) -> None:
    with suppress(OSError):  # Windows does not remove an open file; a folder may have got other contents
        lock.unlink()
        for folder in folders:
            folder.rmdir()


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
