"""Stop a run by a signal: it finishes its step and writes a checkpoint before it ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class StopRequest:
    """A request to stop, set by SIGTERM or Ctrl-C: every rank finishes its step, saves and ends.

    Attributes:
        signal: The signal that this process received; 0 for none. Only the handler writes it, because it can run at any
            instant, even while the ranks agree.
        agreed: The signal that the ranks have agreed to stop for; 0 for none.
    """

    signal: int = 0
    agreed: int = 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a `StopRequest`; a second Ctrl-C interrupts at once."""
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
