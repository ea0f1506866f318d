"""DATASETS, by name: each a function from a path to tracks."""

from collections.abc import Callable
from pathlib import Path

from unbraid.data.folders import list_speakers
from unbraid.data.tracks import Track

DATASETS: dict[str, Callable[[Path], list[Track]]] = {"speakers": list_speakers}
