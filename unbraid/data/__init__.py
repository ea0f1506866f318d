"""DATASETS: from the names in a recipe to functions that list the tracks below a path."""

from collections.abc import Callable
from pathlib import Path

from unbraid.data.folders import list_speakers
from unbraid.data.tracks import Track

DATASETS: dict[str, Callable[[Path], list[Track]]] = {"speakers": list_speakers}
