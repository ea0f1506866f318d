"""Type aliases that many files use: arrays by element type, a JSON row, a progress callback."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

AudioArray = npt.NDArray[np.float32]
"""Audio in [-1, 1], ``(channel, time)`` unless a docstring says otherwise."""

Row = dict[str, Any]
"""One JSON object: a line of a ``.jsonl`` file, or a whole small file."""

ProgressCallback = Callable[[float, str], None]
"""Called with the amount of work done so far and a short text to show next to the bar."""
