"""Checkpoints of SpeechBrain, Asteroid and MSST (BS-RoFormer) read into our models: same weights, same output."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from unbraid.build import build_model
from unbraid.config.recipe import Recipe, recipe_from_table, recipe_table
from unbraid.config.schema import assignment
from unbraid.errors import CheckpointError
from unbraid.importers.asteroid import asteroid
from unbraid.importers.key_mapping import Foreign
from unbraid.importers.msst import roformer
from unbraid.importers.safe_reading import YAML, Settings, list_files, read_settings, read_weights, state_dict
from unbraid.importers.speechbrain import PARTS, speechbrain
from unbraid.run_directory import RunDirectory
from unbraid.train.checkpoint import save_checkpoint


def import_checkpoint(
    paths: Sequence[Path], out: Path, *, sample_rate: int | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """Read a peer's model and write it as a checkpoint of ours.

    Args:
        paths: Its files, or the folder that holds them: weights, and the YAML beside them where there is one.
        out: Run directory to make.
        sample_rate: In Hz, where the files do not say it.
        overrides: Such as ``model.n_heads=8``, for what the files do not say.

    Returns:
        The recipe in the checkpoint: what is known of the model and its data.

    Raises:
        UserError: If the files or the folder cannot be used; nothing has been written then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and no empty folder; name another with -o.")
    try:
        foreign = recognise(paths)
    except (IndexError, TypeError, RuntimeError, ArithmeticError) as error:  # axes that no weight of such a name has
        raise CheckpointError(
            f"{paths[0]} holds weights that fit no model ({type(error).__name__}: {error})."
        ) from error
    recipe = _recipe(foreign, sample_rate, _options(overrides))
    model = build_model(recipe, trust=False)
    load_weights(model, foreign)
    state = {"progress": {"step": 0}, "model": model.state_dict()}
    save_checkpoint(RunDirectory(out), state, recipe=recipe_table(recipe), choices={}, best=True, keep=1)
    return recipe


def recognise(paths: Sequence[Path]) -> Foreign:
    """Which peer's model some files hold, in our words.

    Raises:
        CheckpointError: If they cannot be read, or the model is none that ours can be.
    """
    files = list_files(paths, [f"{part}.ckpt" for part in PARTS])
    settings = read_settings(files)
    found = {file.stem: file for file in files if file.suffix not in YAML}
    if set(found) & set(PARTS):
        if foreign := speechbrain({part: found[part] for part in found if part in PARTS}, settings):
            return foreign
    elif len(found) != 1:
        listed = ", ".join(f"{part}.ckpt" for part in PARTS)
        raise CheckpointError(f"{len(found)} files of weights are named; name one, or a folder with {listed}.")
    else:
        [file] = found.values()
        content = read_weights(file)
        weights = state_dict(file, content)
        if isinstance(content.get("model_name"), str) and isinstance(content.get("model_args"), dict):
            return asteroid(content["model_name"], content["model_args"], weights)
        if "band_split.to_features.0.0.gamma" in weights:
            return roformer(weights, settings)
    raise CheckpointError(
        f"{', '.join(str(path) for path in paths)} is no model that is known here; known are SpeechBrain's SepFormer, "
        "RE-SepFormer and DPRNN, Asteroid's ConvTasNet and DPRNNTasNet, and the BS-RoFormer and Mel-band RoFormer of "
        "MSST."
    )


def load_weights(model: nn.Module, foreign: Foreign) -> None:
    """Give a model of ours the peer's weights.

    Raises:
        CheckpointError: If one is missing, left over, or of another shape; the first is named.
    """
    left, loaded = dict(foreign.weights), {}
    for name, table in foreign.tables.items():
        begin = left.pop(name, table).flatten()[: table.numel()].float()
        if len(begin) < table.numel() or not torch.allclose(begin, table.flatten(), atol=1e-3):
            raise CheckpointError(f"{name} of {foreign.origin} is not the table that ours computes.")
    for ours, like in model.state_dict().items():
        theirs = foreign.names.get(ours, (f"what ours has as {ours}",))
        if absent := [name for name in theirs if name not in left]:
            raise CheckpointError(f"{foreign.origin} lacks {absent[0]}.")
        given = [left.pop(name) for name in theirs]
        if ours.endswith(foreign.turned):
            given = [tensor.flatten(1).T for tensor in given]
        loaded[ours] = _fitted(given, like, f"{theirs[0]} of {foreign.origin}") if given else torch.zeros_like(like)
    if left:
        raise CheckpointError(f"{foreign.origin} has {next(iter(left))}, which ours has not; it is not imported.")
    model.load_state_dict(loaded)


def _fitted(tensors: Sequence[Tensor], like: Tensor, theirs: str) -> Tensor:
    """The peer's weights joined, in the shape of ours; axes of length 1 mean nothing."""
    try:
        joined = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
        stacked = like.flatten(0, like.dim() - joined.dim()) if joined.dim() < like.dim() else like
        if [n for n in joined.shape if n > 1] != [n for n in stacked.shape if n > 1]:
            raise RuntimeError(f"together {tuple(joined.shape)}")
    except (RuntimeError, IndexError) as error:
        shapes = " + ".join(str(tuple(tensor.shape)) for tensor in tensors[:3]) + " ..." * (len(tensors) > 3)
        raise CheckpointError(
            f"{theirs} has the shape {shapes}, where the sizes ask for {tuple(like.shape)}."
        ) from error
    return joined.reshape(like.shape).float()


def _recipe(foreign: Foreign, sample_rate: int | None, options: Settings) -> Recipe:
    model = foreign.model | options
    if missing := [key for key in foreign.needed if key not in model]:
        raise CheckpointError(
            f"The files do not say {' and '.join(missing)} of {foreign.origin}: name the YAML beside them as well, or "
            f"write {' '.join(f'--set model.{key}=...' for key in missing)}."
        )
    said = foreign.data.get("sample_rate")
    if said is None and sample_rate is None:
        raise CheckpointError(f"The files do not say at which rate {foreign.origin} works; add --sample-rate HZ.")
    if said is not None and sample_rate not in (None, said):
        raise CheckpointError(f"{foreign.origin} works at {said} Hz, not {sample_rate}; leave --sample-rate out.")
    data = {"n_sources": model["n_sources"], **foreign.data, "sample_rate": said or sample_rate}
    train = {"max_steps": 1}  # it is not trained by this recipe, but every recipe has an end
    return recipe_from_table({"model": model, "data": data, "loss": foreign.loss, "train": train}, Path())


def _options(overrides: Sequence[str]) -> Settings:
    options: Settings = {}
    like = "model.n_heads=8"
    for text in overrides:
        key, value = assignment(text, like=like)
        where, _, name = key.partition(".")
        if where != "model" or not name:
            raise CheckpointError(f"--set {text!r} must look like {like}.")
        options[name] = value
    return options
