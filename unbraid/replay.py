"""A bad step run again: which example, which layer, and in which precision it goes away."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unbraid.build import build_model, choose_device
from unbraid.config.recipe import recipe_from_table
from unbraid.config.registry import build_loss
from unbraid.errors import CheckpointError
from unbraid.robust.precision import PRECISIONS, Precision
from unbraid.train.diagnose import Diagnosis, diagnose
from unbraid.train.incident import Incident, has_custom_code, read_incident


def replay(path: Path, *, trust: bool = False) -> Iterator[str]:
    """Run a bad step again from its bundle alone, first as it was, then in every other precision.

    Args:
        path: A folder in the incidents of a run.
        trust: Whether code that the bundle's recipe names may run.

    Yields:
        Sentences, as they are found out.

    Raises:
        CheckpointError: If the bundle is damaged or does not fit.
        RecipeError: If its model or loss is somebody's own code and is not trusted.
    """
    incident = read_incident(path)
    about, recorded = incident.about, incident.about["precision"]
    outcome = about["outcome"].replace("_", " ")
    became = "done without its bad examples" if outcome == "trained" else f"left out ({outcome})"
    yield (
        f"Step {about['step']} was {became}; process {about['rank']} had {len(incident.batch.mixture)} examples, in "
        f"{recorded}. It was noted: {about['diagnosis']}"
    )
    others = [name for name in PRECISIONS if name != recorded]
    folder = _folder_of_own_code(path, incident)
    verdicts = {name: _settled(incident, name, folder, trust=trust) for name in (recorded, *others)}
    for name, verdict in verdicts.items():
        yield f"{'Again' if name == recorded else 'Then'}: {verdict.sentence()}"
    yield _conclusion(about, verdicts)


def _folder_of_own_code(path: Path, incident: Incident) -> Path:
    """Where the files lie that the recipe names: here, or in a folder that the incident lies in."""
    files = [f"{name.partition(':')[0]}.py" for name in has_custom_code(incident.recipe)]
    folders = [Path.cwd(), *path.absolute().parents]
    return next((folder for folder in folders if all((folder / file).is_file() for file in files)), Path.cwd())


def _settled(incident: Incident, precision: str, folder: Path, *, trust: bool) -> Diagnosis:
    """What goes wrong in a precision; under fp16 with a loss scale that a run would have come to."""
    if precision != "fp16" or incident.about["precision"] == "fp16":
        return _again(incident, precision, incident.about["loss_scale"], folder, trust=trust)
    verdict = _again(incident, precision, 2.0**16, folder, trust=trust)
    for exponent in (12, 8, 4, 0, -4):
        if verdict.kind != "backward":
            break
        verdict = _again(incident, precision, 2.0**exponent, folder, trust=trust)
    return verdict


def _again(incident: Incident, precision: str, scale: float, folder: Path, *, trust: bool) -> Diagnosis:
    about, device = incident.about, choose_device()
    recipe = recipe_from_table(dict(incident.recipe), folder)
    model = build_model(recipe, trust=trust)
    try:
        model.load_state_dict(incident.weights)
    except RuntimeError as error:
        raise CheckpointError(f"The incident's weights do not fit its model: {str(error).splitlines()[-1]}") from error
    return diagnose(
        model.to(device).train(),
        build_loss(recipe, trust=trust),
        Precision(precision, scale=scale),
        incident.batch.to(device),
        seed=about["seed"],
        step=about["step"],
        rank=about["rank"],
        loss_upper_limit=about["loss_upper_limit"],
    )


def _conclusion(about: Mapping[str, Any], verdicts: dict[str, Diagnosis]) -> str:
    recorded = about["precision"]
    cured = [name for name, verdict in verdicts.items() if verdict.kind == "none"]
    if recorded in cured:
        moved = about.get("weights_after_step", about["step"] - 1) >= about["step"]
        later = "the weights kept are those after the step; " if moved else ""
        return f"In {recorded} it does not happen again here: {later}it may hang on the device, or on torch's version."
    if cured:
        return f"It goes away in {' and '.join(cured)}: train.precision = {cured[0]!r} would have taken the step."
    found = verdicts[recorded]
    if found.item is not None and found.item.files:
        return f"It is there in every precision: look at {' + '.join(found.item.files)}, or name it under data.exclude."
    return "It is there in every precision: it does not come from the number format."
