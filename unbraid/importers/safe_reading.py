"""Reading files of other toolkits without running code in them: weights, and simple lines of YAML."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from unbraid.errors import CheckpointError

Settings = dict[str, Any]
Tensors = dict[str, Tensor]

YAML_SUFFIXES = (".yaml", ".yml")
WEIGHT_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".th", ".safetensors")

UNPARSED = object()
"""Stands for a YAML value that is not read, because it is an expression or has a tag."""


def list_files(paths: Sequence[Path], part_names: Sequence[str]) -> list[Path]:
    """Return the files to read: those named, and of each folder its YAML and its weights.

    Args:
        paths: Files and folders.
        part_names: Names of weight files that belong together; a folder without them must have only one weight file.

    Raises:
        CheckpointError: If a path does not exist, if a folder has no weights or several, or if two files have the same
            name.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist.")
        files += _list_folder(path, part_names) if path.is_dir() else [path]
    weight_files: dict[str, Path] = {}
    for file in files:
        if file.suffix in YAML_SUFFIXES:
            continue
        other = weight_files.setdefault(file.stem, file)
        if other != file:
            raise CheckpointError(f"{other} and {file} are both named. Name the files of one model only.")
    return files


def _list_folder(folder: Path, part_names: Sequence[str]) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    weights = [file for file in files if file.suffix in WEIGHT_SUFFIXES]
    chosen = [file for file in weights if file.name in part_names] or weights
    if not chosen:
        raise CheckpointError(
            f"{folder} has no file of weights ({', '.join(WEIGHT_SUFFIXES)}). Name the file, and its YAML if any."
        )
    # Which of several checkpoints is meant must not be guessed.
    if len(chosen) > 1 and chosen[0].name not in part_names:
        listed = ", ".join(file.name for file in chosen[:5]) + " ..." * (len(chosen) > 5)
        raise CheckpointError(
            f"{folder} has several files of weights ({listed}). Name the one file, and its YAML if there is one."
        )
    return chosen + [file for file in files if file.suffix in YAML_SUFFIXES]


def read_weights(path: Path) -> Settings:
    """Read a file of weights; no code in it runs.

    Returns:
        The content: tensors and plain values, by name.

    Raises:
        CheckpointError: If the file has anything else in it, or cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        # weights_only refuses every class that is not allowed here. Asteroid saves its version of torch, a kind of str.
        with torch.serialization.safe_globals([TorchVersion]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged files raise errors of many kinds
        refused = re.search(r"(?:GLOBAL|class|function|type) ([\w.]+\.\w+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} contains {refused[1]}, which is neither a weight nor a plain value. The file was not read, "
                "and nothing in it ran."
            ) from error
        raise CheckpointError(f"{path} is not a file of weights ({type(error).__name__}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} contains a {type(content).__name__}, not weights by name.")
    return content


def extract_state_dict(path: Path, content: Settings) -> Tensors:
    """Return the weights in the content of a file, by name.

    Raises:
        CheckpointError: If there is anything but ordinary tensors among them.
    """
    # Training programs save other things next to the weights.
    for key in ("state_dict", "model_state_dict", "state"):
        if isinstance(content.get(key), dict):
            content = content[key]
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path} contains {name!r}, a {type(value).__name__}, among the weights.")
        if value.layout != torch.strided or value.is_complex() or value.is_quantized:
            raise CheckpointError(
                f"{path} contains {name!r} as {value.layout} of {value.dtype}. Only dense, real tensors are supported."
            )
    if not content:
        raise CheckpointError(f"{path} contains no weights.")
    # DataParallel and DDP put "module." before every name.
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def read_yaml_files(paths: Sequence[Path]) -> dict[str, Settings]:
    """Read the YAML files among some files with `parse_plain_yaml`.

    Raises:
        CheckpointError: If one is not text in UTF-8.
    """
    texts = []
    for path in paths:
        if path.suffix in YAML_SUFFIXES:
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path} is not text in UTF-8.") from error
    return parse_plain_yaml("\n".join(texts))


_YAML_LINE = re.compile(r"( *)([\w.-]+):(?: +(.*))?")


def parse_plain_yaml(text: str) -> dict[str, Settings]:
    """Parse the simple lines ``key: value`` of a YAML text, by section; everything else is skipped.

    A full parser is not used: the tags of HyperPyYAML name Python objects to create and functions to call.

    Args:
        text: Lines ``key: value`` without indentation, or all with the same indentation below a line ``section:``.

    Returns:
        A dict for each section. The key ``!new`` is the class of the object that a section creates. The section ""
        holds the lines without indentation. ``!ref <key>`` is replaced by the value of that key in the section ""; any
        other value with a tag is `UNPARSED`.
    """
    # Collect the lines, section by section.
    sections: dict[str, Settings] = {"": {}}
    section = ""
    section_indent = 0
    for line in text.splitlines():
        match = _YAML_LINE.fullmatch(re.split(r"(?:^|\s)#", line)[0].rstrip())  # without the comment
        if match is None:
            continue
        indent = len(match[1])
        key = match[2]
        value = (match[3] or "").strip()
        if indent == 0:
            section = key
            section_indent = 0
            sections[section] = {"!new": value.removeprefix("!new:")} if value.startswith("!new:") else {}
            sections[""][key] = _parse_value(value)
            continue
        # The first line of a section sets its indentation; deeper lines belong to something nested.
        section_indent = section_indent or indent
        if indent == section_indent:
            sections[section][key] = _parse_value(value)

    # Then replace references, which may point to later lines.
    return {
        name: {key: value if key == "!new" else _resolve(value, sections[""]) for key, value in settings.items()}
        for name, settings in sections.items()
    }


def _parse_value(text: str) -> Any:
    if len(text) > 1 and text[0] in "'\"" and text[0] == text[-1]:
        return text[1:-1]
    if text[:1] == "[" and text[-1:] == "]":
        return [_parse_value(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    constants = {"true": True, "false": False, "null": None, "~": None, "": None}
    if text.lower() in constants:
        return constants[text.lower()]
    for number_type in (int, float):
        try:
            return number_type(text)
        except ValueError:
            continue
    return text


def _resolve(value: Any, top_level: Settings) -> Any:
    if not isinstance(value, str) or not value.startswith("!"):
        return value
    reference = re.fullmatch(r"!ref <([\w.-]+)>", value)
    if reference is None:
        return UNPARSED
    target = top_level.get(reference[1], UNPARSED)
    # A reference to another reference or object is not followed.
    return UNPARSED if isinstance(target, str) and target.startswith("!") else target
