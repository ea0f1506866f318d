"""Stopwatch: seconds on the clock of the device that does the work."""

from time import perf_counter

import torch


class Stopwatch:
    """Measure the seconds from its construction to `stop`.

    On a GPU the host only queues work, so the host's clock would measure nothing: events in the queue do.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.start_event: torch.cuda.Event | None = None
        self.stop_event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.start_event = torch.cuda.Event(enable_timing=True)
            self.stop_event = torch.cuda.Event(enable_timing=True)
            self.start_event.record()
        self.started = perf_counter()
        self.stopped = 0.0

    def stop(self) -> None:
        """Stop the watch; of several calls the last one counts."""
        self.stopped = perf_counter()
        if self.stop_event is not None:
            self.stop_event.record()

    def seconds(self) -> float:
        """Return the measured seconds, 0 if it was never stopped. On a GPU call it after the work has ended."""
        if self.start_event is not None and self.stop_event is not None and self.stopped:
            return self.start_event.elapsed_time(self.stop_event) / 1000
        return max(0.0, self.stopped - self.started)
