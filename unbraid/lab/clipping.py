"""The AutoClip paper's table in small: percentiles by losses, some seeds of each, scored on unseen talkers."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unbraid.build import list_tracks, load_model
from unbraid.config.recipe import load_recipe
from unbraid.config.schema import assignment
from unbraid.data.dataset import make_dataset
from unbraid.errors import CheckpointError, RecipeError, nearest
from unbraid.evaluate import evaluate
from unbraid.io import to_json_row, write_json
from unbraid.lab.clustering import ClusteredSeparation
from unbraid.lab.confidence import mean_interval
from unbraid.lab.sweep import Arm, RunEnd, RunSummary, SweepRun, plan_runs, set_words, step_overrides, summarise_run
from unbraid.models import MODELS
from unbraid.type_aliases import ProgressCallback

TESTED = "tested.json"
"""In a run's folder, once it has been scored: SI-SDRi of each mixture of the test split, in dB."""

PERCENTILES = (0.0, 1.0, 10.0, 25.0, 50.0, 90.0, 100.0)


@dataclass(frozen=True)
class Contest:
    """A column of the table: a loss, and the model that it trains.

    Attributes:
        model: The recipe's whole ``[model]``, in small; a recipe's own Conv-TasNet or SepFormer stays.
        loss: The name in ``[loss]``; the order of the outputs is left open.
        of_embedding: Whether the sources are clusters of the embedding: the loss trains nothing else.
        published: The paper's column, None where it has none.
    """

    model: Mapping[str, Any]
    loss: str
    of_embedding: bool = False
    published: str | None = None


BLSTM = {"name": "blstm", "hidden": 128, "n_layers": 2}
CHIMERA = {"name": "chimera", "hidden": 128, "n_layers": 2}
CONV_TASNET = {
    "name": "conv_tasnet",
    "n_filters": 128,
    "kernel_size": 32,
    "filters": "fourier",
    "bottleneck": 64,
    "hidden": 128,
    "skip": 64,
    "n_blocks": 6,
    "n_repeats": 2,
}
SEPFORMER = {
    "name": "sepformer",
    "n_filters": 64,
    "kernel_size": 16,
    "chunk_size": 64,
    "n_blocks": 1,
    "n_layers": 2,
    "n_heads": 4,
    "d_hidden": 128,
}

CONTESTS: dict[str, Contest] = {
    "deep_clustering": Contest(CHIMERA, "deep_clustering", of_embedding=True, published="DC"),
    "whitened_kmeans": Contest(CHIMERA, "whitened_kmeans", of_embedding=True, published="WKM"),
    "mask_inference": Contest(BLSTM, "mask_inference", published="MI"),
    "snr": Contest(BLSTM, "neg_snr", published="SNR"),
    "conv_tasnet": Contest(CONV_TASNET, "neg_si_sdr"),
    "sepformer": Contest(SEPFORMER, "neg_si_sdr"),
}
"""By name; Conv-TasNet and SepFormer are trained by SI-SDR, and stand in no table of the paper."""

PUBLISHED: dict[str, dict[float, float]] = {
    "DC": {0: 10.7, 1: 10.7, 10: 10.8, 25: 10.7, 50: 10.7, 90: 10.5, 100: 10.2},
    "WKM": {0: 11.1, 1: 11.2, 10: 11.0, 25: 11.0, 50: 11.0, 90: 11.0, 100: 10.8},
    "MI": {0: 10.0, 1: 10.3, 10: 10.2, 25: 9.9, 50: 9.2, 90: 8.7, 100: 8.5},
    "SNR": {0: 9.9, 1: 10.2, 10: 10.4, 25: 10.3, 50: 9.9, 90: 9.5, 100: 8.3},
}
"""SI-SDR in dB on WSJ0-2mix: Seetharaman et al., "AutoClip", MLSP 2020, arXiv:2007.14469; 4 layers of 600 units."""


@dataclass(frozen=True)
class Cut:
    """A cell of the table: a percentile and a loss over its seeds.

    Attributes:
        loss: Name in `CONTESTS`.
        percentile: Of the norms so far; 100 cuts nothing.
        si_sdri: Mean over the test mixtures of each seed that finished, in dB.
        clipped: Share of the steps that were clipped, mean over seeds.
        final_loss: Mean training loss over the last tenth of the steps, of each seed that finished.
        fallen: What is said of each seed that did not finish.
    """

    loss: str
    percentile: float
    si_sdri: tuple[float, ...]
    clipped: float
    final_loss: tuple[float, ...]
    fallen: tuple[str, ...] = ()


def plan_clipping(
    recipe: Path,
    *,
    percentiles: Sequence[float] = PERCENTILES,
    losses: Sequence[str] = tuple(CONTESTS),
    seeds: int = 2,
    steps: Mapping[str, int] | int | None = None,
    out: Path,
    overrides: Sequence[str] = (),
) -> list[SweepRun]:
    """The runs of the table.

    What the recipe says of model, loss, clipping and transforms is left out: each loss brings its own. A recipe's own
    Conv-TasNet or SepFormer stays, and so do its loss filters for those two: they are meant for SI-SDR.

    Args:
        recipe: Data, optimizer, schedule, budget.
        percentiles: From 0 to 100.
        losses: Names in `CONTESTS`.
        seeds: How many of each.
        steps: Of each run, or by name of the loss; the recipe's budget where nothing is said.
        out: Folder for all runs.
        overrides: As ``--set``; a size of a model goes to each column whose network has it.

    Raises:
        UserError: If recipe, losses or percentiles cannot be used.
    """
    _check(percentiles, losses)
    base = load_recipe(recipe, overrides).model.name
    found: list[SweepRun] = []
    for name in losses:
        contest, n_steps = CONTESTS[name], steps.get(name) if isinstance(steps, Mapping) else steps
        own = [*_parts_of(contest, base), *step_overrides(n_steps)]
        arms = [
            Arm(f"{name},percentile={p:g}", (f"clip={_toml({'name': 'autoclip', 'percentile': float(p)})}",))
            for p in percentiles
        ]
        found += plan_runs(recipe, arms, seeds=seeds, out=out, overrides=[*own, *_meant_for(contest, overrides)])
    return sorted(found, key=lambda cell: cell.seed)  # stable: all arms of a seed before the next


def _parts_of(contest: Contest, base: str) -> list[str]:
    """What a column lays over a recipe whose model has the name given."""
    own = [f"loss={_toml({'name': contest.loss, 'assign': 'permutation'})}", *set_words({"transform": []})]
    if contest.loss != "neg_si_sdr":
        own += set_words({"filter": []})
    stays = contest.loss == "neg_si_sdr" and contest.model["name"] == base
    return own if stays else [*own, f"model={_toml(contest.model)}"]


def _meant_for(contest: Contest, overrides: Sequence[str]) -> list[str]:
    """The overrides without those of the model that this column's network does not have."""
    keys = {f"model.{name}" for name in inspect.signature(MODELS[contest.model["name"]]).parameters}
    of_a_model = [(text, assignment(text)[0]) for text in overrides]
    known_to_one = {
        f"model.{name}" for one in CONTESTS.values() for name in inspect.signature(MODELS[one.model["name"]]).parameters
    }
    return [text for text, key in of_a_model if key in keys or key not in known_to_one]


def _check(percentiles: Sequence[float], losses: Sequence[str]) -> None:
    for p in percentiles:
        if not 0 <= p <= 100:
            raise RecipeError(
                f"--percentiles {p:g} must be from 0, the smallest norm so far, to 100, which never clips."
            )
    for name in losses:
        if name not in CONTESTS:
            raise RecipeError(f"--losses {name!r} is not one of {', '.join(CONTESTS)}.{nearest(name, CONTESTS)}")
    for what, given in (("percentiles", [f"{p:g}" for p in percentiles]), ("losses", list(losses))):
        twice = next((one for place, one in enumerate(given) if one in given[:place]), None)
        if twice is not None:
            raise RecipeError(f"--{what} has {twice} twice; leave one out.")
        if not given:
            raise RecipeError(f"--{what} needs one at least.")


def _toml(table: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "}"


def score(cell: SweepRun, *, n_items: int, progress: ProgressCallback | None = None) -> list[float]:
    """SI-SDRi of a trained run's last weights on mixtures of the test split, in dB; kept in its folder.

    The mixtures are those of seed 0 for every run, so that runs are compared on the same ones.

    Raises:
        UserError: If the data has no test split, or the checkpoint cannot be read.
    """
    path, name = cell.directory.path / TESTED, cell.arm.name.partition(",")[0]
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["n_items"] == n_items:
                return [float(value) for value in known["si_sdri"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error!r}); remove it, and the run is scored again."
            ) from error
    model, recipe = load_model(cell.directory.checkpoints / "last", trust=True)
    if CONTESTS[name].of_embedding:
        model = ClusteredSeparation(model, n_sources=recipe.data.n_sources)
    tracks, noise = list_tracks(recipe)
    tested = make_dataset(tracks, replace(recipe.data, seed=0), "test", noises=noise)
    scores = []
    for row, _ in evaluate(model, tested, recipe, n_items=n_items):
        scores.append(row["si_sdri"])
        if progress is not None:
            progress(len(scores) / n_items, f"{cell.arm.name} seed {cell.seed}  tested on {len(scores)} of {n_items}")
    known = [float(value) for value in scores if value is not None]
    write_json(path, {"n_items": n_items, "si_sdri": known}, indent=None)
    return known


def cuts_of(ended: Sequence[tuple[SweepRun, RunEnd]], *, n_items: int) -> list[Cut]:
    """The cells of the table, from runs that have ended; the tests are made where they are not there yet."""
    by_arm: dict[str, list[tuple[SweepRun, RunSummary]]] = {}
    for cell, how in ended:
        by_arm.setdefault(cell.arm.name, []).append((cell, summarise_run(cell, how)))
    return [_cut(arm, of_arm, n_items) for arm, of_arm in by_arm.items()]


def _cut(arm: str, of_arm: Sequence[tuple[SweepRun, RunSummary]], n_items: int) -> Cut:
    loss, _, percentile = arm.partition(",percentile=")
    finished = [(cell, one) for cell, one in of_arm if one.ended.how == "finished"]
    scores = [score(cell, n_items=n_items) for cell, _ in finished]
    fallen = [one for _, one in of_arm if one.ended.how != "finished"]
    return Cut(
        loss=loss,
        percentile=float(percentile),
        si_sdri=tuple(sum(some) / len(some) for some in scores if some),
        clipped=sum(one.clipped for _, one in of_arm) / len(of_arm),
        final_loss=tuple(one.loss for _, one in finished if one.loss is not None),
        fallen=tuple(f"seed {one.seed} {one.ended.how} at step {one.ended.step}" for one in fallen),
    )


def clipping_json(
    cuts: Sequence[Cut], cells: Sequence[SweepRun], *, n_items: int, date: str, machine: str, command: str
) -> dict[str, Any]:
    """All of it: what was run, and a row for each cell of the table."""
    budget = {cell.arm.name.partition(",")[0]: cell.recipe.train.max_steps for cell in cells}
    data, first = cells[0].recipe.data, cells[0].recipe
    given = {
        "command": command,
        "table": Path(data.path or "").name,
        "steps": budget,
        "seeds": len({cell.seed for cell in cells}),
        "test_items": n_items,
        "excerpt_seconds": data.excerpt_seconds,
        "batch_size": data.batch_size,
        "optimizer": {"name": first.optim.name, **first.optim.options},
        "schedule": {"name": first.schedule.name, **first.schedule.options},
        "models": {cell.arm.name.partition(",")[0]: dict(vars(cell.recipe.model)) for cell in cells},
    }
    return {"date": date, "machine": machine, "given": given, "rows": [to_json_row(cut) for cut in cuts]}


def clipping_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table: percentiles down, losses across, with half the 95 % interval; the paper's column beside each.

    Args:
        rows: As `clipping_json` has them.
    """
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    percentiles = sorted({row["percentile"] for row in rows})
    columns = [(name, kind) for name in losses for kind in ("ours", "paper") if kind == "ours" or _column(name)]
    head = [f"{name}" if kind == "ours" else f"paper, {_column(name)}" for name, kind in columns]
    lines = [f"| p | {' | '.join(head)} |", f"|---{'|---' * len(columns)}|"]
    by_place = {(row["loss"], row["percentile"]): row for row in rows}
    for p in percentiles:
        values = [_ours(by_place.get((name, p))) if kind == "ours" else _theirs(name, p) for name, kind in columns]
        lines.append(f"| {p:g} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def _column(loss: str) -> str | None:
    return CONTESTS[loss].published


def _ours(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return "; ".join([mean_interval(row["si_sdri"]).text(), *row["fallen"]])


def _theirs(loss: str, percentile: float) -> str:
    value = PUBLISHED[_column(loss) or ""].get(percentile)
    return "-" if value is None else f"{value:.1f}"


def reading(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each loss: the best percentile against no clipping, seed by seed."""
    return [
        _read(loss, [row for row in rows if row["loss"] == loss]) for loss in dict.fromkeys(r["loss"] for r in rows)
    ]


def _read(loss: str, rows: Sequence[Mapping[str, Any]]) -> str:
    bare = next((row for row in rows if row["percentile"] == 100), None)
    others = [row for row in rows if row["percentile"] != 100 and row["si_sdri"]]
    if bare is None or not others or not bare["si_sdri"]:
        return f"{loss}: nothing to hold against training without clipping."
    best = max(others, key=lambda row: mean_interval(row["si_sdri"]).mean)
    if len(best["si_sdri"]) != len(bare["si_sdri"]) or best["fallen"] or bare["fallen"]:
        return f"{loss}: p = {best['percentile']:g} came out highest; not every seed finished, so nothing is paired."
    pairs = zip(best["si_sdri"], bare["si_sdri"], strict=True)
    gain = mean_interval([own - without for own, without in pairs], level=1 - 0.05 / len(others))
    which = (
        f"of those clipped p = {best['percentile']:g} came out highest"
        if len(others) > 1
        else f"p = {best['percentile']:g}"
    )
    told = f"{loss}: {which}, {round(gain.mean, 2) + 0.0:+.2f} dB against no clipping"
    if gain.n < 2:
        return f"{told}, of one seed."
    sure = "above 0" if gain.low > 0 else "below 0" if gain.high < 0 else "which includes 0: no difference is shown"
    chosen = f" (widened, as the best of {len(others)} was picked)" * (len(others) > 1)
    return (
        f"{told}; seed by seed over {gain.n} the 95 % interval{chosen} is {gain.low:.2f} to {gain.high:.2f} dB, {sure}."
    )
