"""Files of others: weights without any code, and of YAML only plain lines ``key: value``."""

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

YAML = (".yaml", ".yml")
WEIGHTS = (".ckpt", ".pth", ".pt", ".bin", ".th", ".safetensors")

UNREAD = object()
"""A value that is written in another way than plainly."""


def list_files(paths: Sequence[Path], parts: Sequence[str]) -> list[Path]:
    """The files named; of a folder its YAML, and its weights: those that are called as the parts, or its only ones.

    Raises:
        CheckpointError: If there is no such file, if a folder holds no weights or does not say which, or if two files
            are called alike.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"There is no {path}.")
        files += _files_in(path, parts) if path.is_dir() else [path]
    by_name = {file.stem: file for file in files if file.suffix not in YAML}
    for file in files:
        if (other := by_name.get(file.stem, file)) != file and file.suffix not in YAML:
            raise CheckpointError(f"{file} and {other} are both named; name those of one model.")
    return files


def _files_in(folder: Path, parts: Sequence[str]) -> list[Path]:
    held = sorted(file for file in folder.iterdir() if file.is_file())
    weights = [file for file in held if file.suffix in WEIGHTS]
    chosen = [file for file in weights if file.name in parts] or weights
    if not chosen or (len(chosen) > 1 and chosen[0].name not in parts):
        listed = ", ".join(file.name for file in chosen[:5]) + " ..." * (len(chosen) > 5)
        found = f"several files of weights ({listed})" if chosen else f"no file of weights ({', '.join(WEIGHTS)})"
        raise CheckpointError(f"{folder} holds {found}; name the one file, and its YAML where there is one.")
    return chosen + [file for file in held if file.suffix in YAML]


def read_weights(path: Path) -> Settings:
    """What a file of weights holds; what is neither tensor nor plain value is refused, and no code in it is run.

    Raises:
        CheckpointError: In one sentence.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        with torch.serialization.safe_globals([TorchVersion]):  # a text, which Asteroid notes down
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        if named := re.search(r"(?:GLOBAL|class|function|type) ([\w.]+\.\w+)", str(error)):
            raise CheckpointError(
                f"{path} holds {named[1]}, neither weights nor a plain value: it is not read, and nothing in it ran."
            ) from error
        raise CheckpointError(f"{path} is no file of weights ({type(error).__name__}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} where weights by their names are asked for.")
    return content


def state_dict(path: Path, content: Settings) -> Tensors:
    """The weights in what a file holds, by their names.

    Raises:
        CheckpointError: If there is anything else among them.
    """
    for key in ("state_dict", "model_state_dict", "state"):
        if isinstance(content.get(key), dict):
            content = content[key]
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path} holds {name!r}, a {type(value).__name__}, where weights are asked for.")
        if value.layout != torch.strided or value.is_complex() or value.is_quantized:
            raise CheckpointError(
                f"{path} holds {name!r} as {value.layout} of {value.dtype}; plain numbers are asked for."
            )
    if not content:
        raise CheckpointError(f"{path} holds no weights.")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def read_settings(paths: Sequence[Path]) -> dict[str, Settings]:
    """`plain_settings` of all the YAML among some files.

    Raises:
        CheckpointError: If one is no text.
    """
    texts = []
    for path in paths:
        if path.suffix in YAML:
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path} is no text in UTF-8.") from error
    return plain_settings("\n".join(texts))


_LINE = re.compile(r"( *)([\w.-]+):(?: +(.*))?")


def plain_settings(text: str) -> dict[str, Settings]:
    """What plain lines ``key: value`` of YAML say, by section; all other YAML is passed over.

    Args:
        text: ``key: value`` at the margin, or below a ``section:`` and there all indented alike.

    Returns:
        A dict for each section, in which ``!new`` is the class where it makes an object; what stands at the margin
        under "". ``!ref <key>`` is the value of that key at the margin; whatever else has a tag is `UNREAD`.
    """
    sections: dict[str, Settings] = {"": {}}
    section, depth = "", 0
    for line in text.splitlines():
        found = _LINE.fullmatch(re.split(r"(?:^|\s)#", line)[0].rstrip())
        if found is None:
            continue
        indent, key, value = len(found[1]), found[2], (found[3] or "").strip()
        if indent == 0:
            section, depth = key, 0
            sections[section] = {"!new": value.removeprefix("!new:")} if value.startswith("!new:") else {}
            sections[""][key] = _value(value)
        elif indent == (depth := depth or indent):
            sections[section][key] = _value(value)
    return {
        name: {key: _resolved(value, sections[""]) if key != "!new" else value for key, value in of_section.items()}
        for name, of_section in sections.items()
    }


def _value(text: str) -> Any:
    if len(text) > 1 and text[0] in "'\"" and text[0] == text[-1]:
        return text[1:-1]
    if text[:1] == "[" and text[-1:] == "]":
        return [_value(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    words = {"true": True, "false": False, "null": None, "~": None, "": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _resolved(value: Any, at_margin: Settings) -> Any:
    if not isinstance(value, str) or not value.startswith("!"):
        return value
    key = re.fullmatch(r"!ref <([\w.-]+)>", value)
    known = at_margin.get(key[1], UNREAD) if key else UNREAD
    return UNREAD if isinstance(known, str) and known.startswith("!") else known
