"""A signal to a run: the step at hand is finished and a checkpoint written before it ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class StopRequest:
    """Set by SIGTERM or Ctrl-C: the step at hand is finished, a checkpoint written, and the run ends on every rank.

    Attributes:
        signal: What this process received; 0 for nothing. Only the handler writes it: it may strike at any instant,
            also while the ranks agree.
        agreed: What the ranks have agreed to stop for; 0 for nothing.
    """

    signal: int = 0
    agreed: int = 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a `StopRequest`; a second Ctrl-C is not held back any more."""
    request = StopRequest()

    def ask(number: int, _frame: FrameType | None) -> None:
        request.signal = number
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {int(number): signal.signal(number, ask) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
