"""Importing checkpoints of SpeechBrain, Asteroid and MSST (BS-RoFormer): same weights, same output."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from unbraid.build import build_model
from unbraid.config.recipe import Recipe, recipe_from_table, recipe_table
from unbraid.config.schema import parse_override
from unbraid.errors import CheckpointError
from unbraid.importers.asteroid import read_asteroid
from unbraid.importers.key_mapping import ImportedModel
from unbraid.importers.msst import read_roformer
from unbraid.importers.safe_reading import (
    YAML_SUFFIXES,
    Settings,
    extract_state_dict,
    list_files,
    read_weights,
    read_yaml_files,
)
from unbraid.importers.speechbrain import PARTS, read_speechbrain
from unbraid.run_directory import RunDirectory
from unbraid.train.checkpoint import save_checkpoint


def import_checkpoint(
    paths: Sequence[Path], out: Path, *, sample_rate: int | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """Read a model of another toolkit and write it as a checkpoint of unbraid.

    Args:
        paths: The model's files, or the folder that contains them: weights, and the YAML file if there is one.
        out: Run directory to create.
        sample_rate: Sample rate in Hz, if the files do not contain it.
        overrides: Settings that the files do not contain, such as ``model.n_heads=8``.

    Returns:
        The recipe in the checkpoint: what is known of the model and its data.

    Raises:
        UserError: If the files or the folder cannot be used; then nothing is written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder. Choose another with -o.")

    # Read the files. Their weights may have any shapes under the right names, hence the broad list of errors.
    try:
        imported = read_model(paths)
    except (IndexError, TypeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{paths[0]} has weights that fit no model ({type(error).__name__}: {error}).") from error

    # Build the same model and load the weights.
    recipe = _make_recipe(imported, sample_rate, _parse_overrides(overrides))
    model = build_model(recipe, trust=False)
    load_weights(model, imported)

    # Save only when everything fits.
    state = {"progress": {"step": 0}, "model": model.state_dict()}
    save_checkpoint(RunDirectory(out), state, recipe=recipe_table(recipe), choices={}, best=True, keep=1)
    return recipe


def read_model(paths: Sequence[Path]) -> ImportedModel:
    """Read the files of a model, and find out which toolkit it comes from.

    Raises:
        CheckpointError: If the files cannot be read, or unbraid has no such model.
    """
    files = list_files(paths, [f"{part}.ckpt" for part in PARTS])
    settings = read_yaml_files(files)
    weight_files = {file.stem: file for file in files if file.suffix not in YAML_SUFFIXES}

    # SpeechBrain: one file for each part of the model.
    if set(weight_files) & set(PARTS):
        part_files = {name: file for name, file in weight_files.items() if name in PARTS}
        imported = read_speechbrain(part_files, settings)
        if imported is not None:
            return imported
        raise _unknown_model(paths)
    if len(weight_files) != 1:
        listed = ", ".join(f"{part}.ckpt" for part in PARTS)
        raise CheckpointError(f"{len(weight_files)} files of weights are named. Name one, or a folder with {listed}.")

    # Asteroid and MSST: one file, recognised by what is in it.
    [file] = weight_files.values()
    content = read_weights(file)
    weights = extract_state_dict(file, content)
    if isinstance(content.get("model_name"), str) and isinstance(content.get("model_args"), dict):
        return read_asteroid(content["model_name"], content["model_args"], weights)
    if "band_split.to_features.0.0.gamma" in weights:
        return read_roformer(weights, settings)
    raise _unknown_model(paths)


def _unknown_model(paths: Sequence[Path]) -> CheckpointError:
    return CheckpointError(
        f"{', '.join(str(path) for path in paths)} is not a known model. Models that can be imported are SpeechBrain's "
        "SepFormer, RE-SepFormer and DPRNN, Asteroid's ConvTasNet and DPRNNTasNet, and the BS-RoFormer and Mel-band "
        "RoFormer of MSST."
    )


def load_weights(model: nn.Module, imported: ImportedModel) -> None:
    """Load imported weights into an unbraid model.

    Raises:
        CheckpointError: If a weight is missing, unused, or of another shape; the message names the first.
    """
    unused = dict(imported.weights)

    # Fixed tables, such as positions, are computed here and not loaded. If the file has one, it must be the same.
    for name, table in imported.expected_tables.items():
        start = unused.pop(name, table).flatten()[: table.numel()].float()
        if len(start) < table.numel() or not torch.allclose(start, table.flatten(), atol=1e-3):
            raise CheckpointError(f"{name} of {imported.origin} is not the table that unbraid computes.")

    # Weights, one or several of theirs for each of ours.
    state_dict: dict[str, Tensor] = {}
    for our_name, our_weight in model.state_dict().items():
        if our_name not in imported.key_map:
            raise CheckpointError(f"{imported.origin} lacks the weight that unbraid calls {our_name}.")
        their_names = imported.key_map[our_name]
        for their_name in their_names:
            if their_name not in unused:
                raise CheckpointError(f"{imported.origin} lacks {their_name}.")
        tensors = [unused.pop(their_name) for their_name in their_names]
        if our_name.endswith(imported.transposed_suffixes):
            tensors = [tensor.flatten(1).T for tensor in tensors]
        if tensors:
            label = f"{their_names[0]} of {imported.origin}"
            state_dict[our_name] = _join_and_reshape(tensors, our_weight, label)
        else:
            state_dict[our_name] = torch.zeros_like(our_weight)

    # A weight that is not used would mean that the models differ.
    if unused:
        raise CheckpointError(f"{imported.origin} has {next(iter(unused))}, which unbraid's model lacks.")
    model.load_state_dict(state_dict)


def _join_and_reshape(tensors: Sequence[Tensor], target: Tensor, label: str) -> Tensor:
    """Concatenate imported weights and give them the shape of ours; axes of length 1 are ignored."""
    try:
        joined = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
        # Ours may stack along several axes what is concatenated along one.
        stacked = target.flatten(0, target.dim() - joined.dim()) if joined.dim() < target.dim() else target
        if [n for n in joined.shape if n > 1] != [n for n in stacked.shape if n > 1]:
            raise RuntimeError(f"together {tuple(joined.shape)}")
    except (RuntimeError, IndexError) as error:
        shapes = " + ".join(str(tuple(tensor.shape)) for tensor in tensors[:3]) + " ..." * (len(tensors) > 3)
        raise CheckpointError(
            f"{label} has the shape {shapes}, but the model's sizes require {tuple(target.shape)}."
        ) from error
    return joined.reshape(target.shape).float()


def _make_recipe(imported: ImportedModel, sample_rate: int | None, overrides: Settings) -> Recipe:
    # Settings of the model that no weight's shape reveals.
    model = imported.model_settings | overrides
    missing = [key for key in imported.required_keys if key not in model]
    if missing:
        raise CheckpointError(
            f"The files do not contain {' and '.join(missing)} of {imported.origin}. Name its YAML file too, or add "
            f"{' '.join(f'--set model.{key}=...' for key in missing)}."
        )

    # The sample rate, from the files or from the user.
    file_rate = imported.data_settings.get("sample_rate")
    if file_rate is None and sample_rate is None:
        raise CheckpointError(f"The files do not contain the sample rate of {imported.origin}; add --sample-rate HZ.")
    if file_rate is not None and sample_rate not in (None, file_rate):
        raise CheckpointError(f"{imported.origin} works at {file_rate} Hz, not {sample_rate}. Omit --sample-rate.")
    data = {"n_sources": model["n_sources"], **imported.data_settings, "sample_rate": file_rate or sample_rate}

    train = {"max_steps": 1}  # required in every recipe, although this one trains nothing
    return recipe_from_table({"model": model, "data": data, "loss": imported.loss_settings, "train": train}, Path())


def _parse_overrides(overrides: Sequence[str]) -> Settings:
    """Return the keys of ``[model]`` in texts such as ``model.n_heads=8``."""
    settings: Settings = {}
    like = "model.n_heads=8"
    for text in overrides:
        key, value = parse_override(text, example=like)
        table, _, name = key.partition(".")
        if table != "model" or not name:
            raise CheckpointError(f"--set {text!r} must look like {like}.")
        settings[name] = value
    return settings
