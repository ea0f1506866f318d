"""Rerun a bad step: find the example, the layer, and a precision in which the fault does not occur."""

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
    """Rerun a bad step from its incident folder alone, in its own precision and then in every other.

    Args:
        path: A folder in the incidents of a run directory.
        trust: Whether code that the incident's recipe names may run.

    Yields:
        Sentences to print: what was recorded, the diagnosis in each precision, and a conclusion.

    Raises:
        CheckpointError: If the incident is damaged, or its weights do not fit its model.
        RecipeError: If its model or loss is custom code that is not trusted.
    """
    incident = read_incident(path)
    about = incident.about
    recorded = about["precision"]

    # What the run recorded.
    outcome = about["outcome"].replace("_", " ")
    # A step that was trained has an incident if it was repeated on its clean examples (on_bad_example = "rescue").
    taken = "taken without its bad examples" if outcome == "trained" else f"skipped ({outcome})"
    yield (
        f"Step {about['step']} was {taken}; process {about['rank']} had {len(incident.batch.mixture)} examples, in "
        f"{recorded}. Recorded diagnosis: {about['diagnosis']}"
    )

    # The same step in every precision, its own first.
    others = [name for name in PRECISIONS if name != recorded]
    folder = _custom_code_folder(path, incident)
    diagnoses = {name: _diagnose_in(name, incident, folder, trust=trust) for name in (recorded, *others)}
    for name, diagnosis in diagnoses.items():
        yield f"{'Rerun' if name == recorded else 'Compared'}: {diagnosis.sentence()}"
    yield _conclusion(about, diagnoses)


def _custom_code_folder(path: Path, incident: Incident) -> Path:
    """Return the folder with the files that the recipe names: the current one, or one that contains the incident."""
    files = [f"{name.partition(':')[0]}.py" for name in has_custom_code(incident.recipe)]
    folders = [Path.cwd(), *path.absolute().parents]
    return next((folder for folder in folders if all((folder / file).is_file() for file in files)), Path.cwd())


def _diagnose_in(precision: str, incident: Incident, folder: Path, *, trust: bool) -> Diagnosis:
    """Return the diagnosis in a precision; for fp16 with a loss scale that a run would have reached."""
    if precision != "fp16" or incident.about["precision"] == "fp16":
        return _rerun(incident, precision, incident.about["loss_scale"], folder, trust=trust)
    # The incident has no fp16 loss scale. Start from the usual 2**16; a run would lower it after each overflow in the
    # backward pass, so lower it here too, in larger steps.
    diagnosis = _rerun(incident, precision, 2.0**16, folder, trust=trust)
    for exponent in (12, 8, 4, 0, -4):
        if diagnosis.kind != "backward":
            break
        diagnosis = _rerun(incident, precision, 2.0**exponent, folder, trust=trust)
    return diagnosis


def _rerun(incident: Incident, precision: str, loss_scale: float, folder: Path, *, trust: bool) -> Diagnosis:
    about = incident.about
    device = choose_device()
    recipe = recipe_from_table(dict(incident.recipe), folder)
    model = build_model(recipe, trust=trust)
    try:
        model.load_state_dict(incident.weights)
    except RuntimeError as error:
        raise CheckpointError(f"The incident's weights do not fit its model: {str(error).splitlines()[-1]}") from error
    return diagnose(
        model.to(device).train(),
        build_loss(recipe, trust=trust),
        Precision(precision, scale=loss_scale),
        incident.batch.to(device),
        seed=about["seed"],
        step=about["step"],
        rank=about["rank"],
        loss_upper_limit=about["loss_upper_limit"],
    )


def _conclusion(about: Mapping[str, Any], diagnoses: dict[str, Diagnosis]) -> str:
    recorded = about["precision"]
    healthy = [name for name, diagnosis in diagnoses.items() if diagnosis.kind == "none"]
    if recorded in healthy:
        # On an accelerator later steps may have been launched before the fault was seen.
        weights_changed = about.get("weights_after_step", about["step"] - 1) >= about["step"]
        note = "the saved weights are those after the step; " if weights_changed else ""
        return f"The fault does not recur in {recorded}: {note}it may depend on the device or torch's version."
    if healthy:
        return (
            f"The fault does not occur in {' and '.join(healthy)}: the step would have been taken with "
            f"train.precision = {healthy[0]!r}."
        )
    item = diagnoses[recorded].item
    if item is not None and item.files:
        return f"The fault occurs in every precision: check {' + '.join(item.files)}, or list it in data.exclude."
    return "The fault occurs in every precision, so the number format is not the cause."
