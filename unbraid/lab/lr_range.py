"""Learning-rate range test and grid: which learning rate a recipe should begin with, from its own model and mixtures.

The rate grows by the same factor from step to step, until the loss is lost or the range ends. Too low a rate moves
nothing, too high a rate spoils what was reached; in between the loss comes down, and the suggestion is where it has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import nn

from unbraid.config.recipe import Component
from unbraid.data.batch import Batch
from unbraid.errors import UserError
from unbraid.lab.experiment import Experiment, mean_loss
from unbraid.plot_data import running_mean
from unbraid.signals import StopRequest
from unbraid.train.state import TrainState, evaluation_weights, set_learning_rate
from unbraid.train.step import train_step
from unbraid.type_aliases import FloatArray, ProgressCallback

FROM, TO, N_STEPS = 1e-7, 10.0, 200
FIRST_STEPS = 20
"""Chance is judged by so many first steps or more: by five, noise alone makes a suggestion in one test of five."""
AT_LEAST_STEPS = 3 * FIRST_STEPS
"""With fewer there is too little left of the range after its first steps."""
DONE = 0.98
"""The share of its descent by which the loss has made it. Where exactly it is lowest is chance, as the floor is flat;
where it falls fastest lies a factor of ten or more below the best rate of a grid."""
LOST = 0.5
"""The share of its descent that the loss has to give back to be called lost."""
IN_A_ROW = 5
"""So many steps without a finite loss and gradient, and the loss is lost too."""
SCATTERS = 4.0
"""A change of less than so many standard deviations of single losses at rates that move nothing is taken for chance."""


@dataclass(frozen=True)
class RangeStep:
    """One step of a range test.

    Attributes:
        loss: Before the step, so that it tells of the rates before.
        grad_norm: Before clipping.
        update_ratio: Norm of what the step changed over that of all weights.
    """

    loss: float
    grad_norm: float
    update_ratio: float


@dataclass(frozen=True)
class RangeTest:
    """A range test's outcome; all arrays ``(step,)``, NaN where a step had no finite value.

    Attributes:
        name: What was tested.
        optimizer: Its name in the recipe.
        clipper: Its name there.
        lrs: The learning rate of each step that was made.
        losses: Before that step, each on mixtures of its own.
        smoothed_capped: The same, averaged over neighbouring steps, and capped at where it began; see `smooth_losses`.
        grad_norms: Before clipping.
        update_ratios: Norm of the step's change over the norm of the weights.
        stop_reason: Why it ended there; a sentence.
        suggestion: The learning rate to take, with two digits; None where the test does not tell.
        reason: Why; a sentence or two.
    """

    name: str
    optimizer: str
    clipper: str
    lrs: FloatArray
    losses: FloatArray
    smoothed_capped: FloatArray
    grad_norms: FloatArray
    update_ratios: FloatArray
    stop_reason: str
    suggestion: float | None
    reason: str


@dataclass(frozen=True)
class LrGrid:
    """Short trainings from the same weights on the same mixtures, each with one learning rate.

    Attributes:
        lrs: Ascending, ``(rate,)``.
        losses: Mean loss over fixed mixtures afterwards, ``(rate,)``; NaN or infinite as it came out.
        n_steps: Of each training.
        n_items: Mixtures that it is judged by.
    """

    lrs: FloatArray
    losses: FloatArray
    n_steps: int
    n_items: int

    @property
    def best(self) -> float | None:
        """The learning rate that ends lowest; None where none ends finite."""
        finite = np.isfinite(self.losses)
        return float(self.lrs[np.where(finite, self.losses, np.inf).argmin()]) if finite.any() else None


def learning_rates(start: float = FROM, end: float = TO, n_steps: int = N_STEPS) -> FloatArray:
    """Learning rates that grow by the same factor from step to step, ``(step,)``.

    Raises:
        UserError: If the range is none, or has too few steps.
    """
    if not 0 < start < np.inf or not 0 < end < np.inf:
        raise UserError(f"A learning rate is above 0 and finite, and --from {start:g} --to {end:g} are not both.")
    if start >= end:
        raise UserError(f"The range is upside down: --from {start:g} must be below --to {end:g}.")
    if n_steps < AT_LEAST_STEPS:
        raise UserError(f"--steps {n_steps} is too few to see a trend in; take {AT_LEAST_STEPS} or more.")
    return np.geomspace(start, end, n_steps)


def lr_range(
    experiment: Experiment,
    lrs: FloatArray | None = None,
    *,
    stop: StopRequest | None = None,
    progress: ProgressCallback = lambda _done, _text: None,
) -> RangeTest:
    """Test a range of learning rates on a copy of a experiment's model, one step with each.

    Optimizer, clipper and transforms are the recipe's; its schedule, loss filters and average take no part.

    Args:
        experiment: Its recipe, weights and mixtures.
        lrs: Ascending, ``(step,)``; those of `learning_rates` where nothing is said.
        stop: Ends it early, with what is known by then.
        progress: Is told how many steps are done, and what came of the last.

    Raises:
        RecipeError: If the recipe's parts cannot be used, or its optimizer has no learning rate to set.

    Reference:
        Smith, "Cyclical learning rates for training neural networks", WACV 2017, arXiv:1506.01186, of which the
        exponential growth and the rule are not.
    """
    lrs = learning_rates() if lrs is None else lrs
    probe = with_constant_lr(experiment)
    state, stream = probe.new_state(), probe.training_batches()
    points, stop_reason, lost = run_range_test(
        lambda lr: measure_step(state, next(stream), lr), lrs, stop=stop, progress=progress
    )
    losses = np.array([point.loss for point in points])
    suggestion, reason = suggest_lr(lrs[: len(points)], losses, n_planned=len(lrs), lost=lost)
    return RangeTest(
        experiment.name,
        experiment.recipe.optim.name,
        experiment.recipe.clip.name,
        lrs[: len(points)],
        losses,
        smooth_losses(losses, n_baseline_steps(len(lrs))),
        np.array([point.grad_norm for point in points]),
        np.array([point.update_ratio for point in points]),
        stop_reason,
        suggestion,
        reason,
    )


def with_constant_lr(experiment: Experiment) -> Experiment:
    """The same with a constant learning rate of 1 to be multiplied, and without loss filters and average."""
    recipe = experiment.recipe
    optim = replace(recipe.optim, options={**recipe.optim.options, "lr": 1.0})
    bare = replace(
        recipe, optim=optim, schedule=Component("constant"), filters=(), train=replace(recipe.train, ema=0.0)
    )
    return replace(experiment, recipe=bare)


def measure_step(state: TrainState, parts: Sequence[Batch], lr: float) -> RangeStep:
    """One training step with a learning rate, and what it changed.

    Args:
        state: Changed in place; made of a recipe whose learning rate is 1.
        parts: The step's micro-batches.
        lr: That of the optimizer's first parameter group; others keep their proportion.
    """
    weights = [p.detach() for p in state.unwrapped_model.parameters()]
    before = [weight.clone() for weight in weights]
    set_learning_rate(state, lr)
    record = train_step(state, parts)
    moved = nn.utils.get_total_norm(torch._foreach_sub(weights, before)) / nn.utils.get_total_norm(before)
    known = [np.nan if value is None else value for value in (record.loss, record.grad_norm)]
    loss, grad_norm, ratio = (value if np.isfinite(value) else np.nan for value in (*known, float(moved)))
    return RangeStep(loss if record.trained else np.nan, grad_norm, ratio)


def run_range_test(
    take_step: Callable[[float], RangeStep],
    lrs: FloatArray,
    *,
    stop: StopRequest | None = None,
    progress: ProgressCallback = lambda _done, _text: None,
) -> tuple[list[RangeStep], str, bool]:
    """Take a step with each learning rate in turn until the loss is lost.

    Args:
        take_step: Takes a step with the learning rate given.
        lrs: Ascending, ``(step,)``.
        stop: Ends it early.
        progress: Is told how many steps are done, and what came of the last.

    Returns:
        What came of each step, why it ended, and whether the loss was lost.
    """
    points = list[RangeStep]()
    for lr in map(float, lrs):
        if stop is not None and stop.signal:
            return points, f"It was interrupted before {format_lr(lr)}.", False
        points.append(take_step(lr))
        progress(len(points), f"lr {format_lr(lr)}  loss {points[-1].loss:.3g}")
        if why := divergence_reason(np.array([point.loss for point in points]), len(lrs)):
            return points, f"At {format_lr(lr)} {why}.", True
    return points, f"It went through to {format_lr(lrs[-1])}, and the loss was never lost.", False


def divergence_reason(losses: FloatArray, n_planned: int) -> str:
    """What says that the loss is lost by now; empty where nothing does.

    It is lost if it has given back half of its descent (`LOST`) and that is no chance: mixtures differ, and so do
    losses at rates that move nothing, by which chance is judged. SI-SDR does not know the level, so that a model
    however far off keeps a loss that is finite and not even high: then the descent is all there is to go by.

    Args:
        losses: So far, ``(step,)``; NaN where a step was left out.
        n_planned: Steps in all, if it is never lost.
    """
    if len(losses) >= IN_A_ROW and not np.isfinite(losses[-IN_A_ROW:]).any():
        return f"{IN_A_ROW} steps in a row had a loss or gradient that is not finite"
    known, n_first = losses[np.isfinite(losses)], n_baseline_steps(n_planned)
    if len(known) <= n_first:
        return ""
    means = running_mean(known, max(5, n_planned // 20))[n_first - 1 :]
    top, low, last = known[:n_first].mean(), means.min(), means[-1]
    if last - low <= max(LOST * (top - low), SCATTERS * loss_noise(known, n_first)):
        return ""
    if top - low <= SCATTERS * loss_noise(known, n_first):
        return f"the loss had risen to {last:.3g} from {top:.3g}, and never come down before"
    return f"the loss was back at {last:.3g}, after it had come down from {top:.3g} to {low:.3g}"


def n_baseline_steps(n_planned: int) -> int:
    """How many steps say where a range test begins, and how much is chance: a tenth of those planned, 20 or more."""
    return max(FIRST_STEPS, n_planned // 10)


def loss_noise(losses: FloatArray, n_first: int) -> float:
    """How much the loss differs between mixtures alone: its standard deviation from one first step to the next."""
    return float(np.diff(losses[:n_first]).std(ddof=1) / np.sqrt(2))


def smooth_losses(losses: FloatArray, n_first: int) -> FloatArray:
    """Each loss averaged with its neighbours before and after, by a Gaussian of 3 % of the steps; ``(step,)``.

    It is capped: a loss higher than any of the first counts as the highest of those, or a single one that has gone
    through the roof would hide how low its neighbours were. Where the loss is lost the curve is thus flat.

    Args:
        losses: ``(step,)``; what is not finite counts for nothing, and stays as it is.
        n_first: How many of them say where it begins; see `n_baseline_steps`.
    """
    known, width = np.isfinite(losses), max(0.7, 0.03 * len(losses))
    highest = losses[known][:n_first].max(initial=-np.inf)
    capped = np.where(known, np.minimum(losses, highest), 0.0)
    sums, weights = (gaussian_filter1d(values, width, mode="constant") for values in (capped, known * 1.0))
    means = sums / np.maximum(weights, np.finfo(float).tiny)
    return np.where(known, means, np.nan)


def suggest_lr(
    lrs: FloatArray, losses: FloatArray, *, n_planned: int | None = None, lost: bool = False
) -> tuple[float | None, str]:
    """The learning rate by which the smoothed loss has done most of its descent (`DONE`), and why.

    Held against the best rate of a grid of half decades, 40 steps each. The rule was chosen on the following, which is
    thus no test of it: a small Conv-TasNet and BLSTM with three seeds each, all twelve of Adam and Muon within a factor
    of 2.7; of fifteen of SGD (clipped, not clipped, with momentum) seven within a factor of 3 and eight below it, by a
    factor of 7 at the median and 17 at most, as the grid is flat there over more than a decade of rates. On others, one
    seed each, it came to these multiples of the best: DPRNN 2.0, SepFormer 3.1, TF-Locoformer with AdamW 0.46, a larger
    Conv-TasNet with Adam 2.2, Muon 1.2, RMSprop 0.7, schedule-free 0.19, and with Adam by the loss neg_snr 0.57, l1
    3.2, with AutoClip 6.2.

    Args:
        lrs: Ascending, ``(step,)``.
        losses: Before the step with that rate, ``(step,)``; NaN where a step was left out.
        n_planned: How many steps there were to be; as many as there are where nothing is said.
        lost: Whether the loss was lost at the last. With fewer steps than planned it was interrupted otherwise.

    Returns:
        The rate, with two digits, and a sentence; where the test does not tell, None and a sentence on what to do.
    """
    n_planned = len(lrs) if n_planned is None else n_planned
    n_first, interrupted, known = n_baseline_steps(n_planned), not lost and len(lrs) < n_planned, np.isfinite(losses)
    lrs, losses = lrs[known], losses[known]
    if len(losses) < 1.5 * n_first:
        lower = f": begin lower than --from {format_lr(lrs[0])}" if lost and len(lrs) else ""
        return None, f"The loss is known of {len(losses)} steps only, too few for a suggestion{lower}."
    smoothed = smooth_losses(losses, n_first)
    top, lowest = float(losses[:n_first].mean()), int(smoothed.argmin())
    low, still_falling = float(smoothed[lowest]), not lost and lowest >= len(losses) - n_first / 2
    if top - low <= SCATTERS * loss_noise(losses, n_first) / 2:
        return None, (
            f"The loss never came down from {top:.3g} by more than mixtures differ: take more --steps, or a larger "
            "data.batch_size."
        )
    halfway, place = (int(np.argmax(smoothed <= top - share * (top - low))) for share in (0.5, DONE))
    if halfway < n_first:
        return (
            None,
            f"The loss was down by {format_lr(lrs[halfway])} already: begin lower than --from {format_lr(lrs[0])}.",
        )
    if still_falling and interrupted:
        return (
            None,
            f"The loss was down to {low:.3g} from {top:.3g}, and it was still falling where the test was stopped.",
        )
    rate = float(f"{lrs[place - 1]:.1e}")  # the step before is the last that this loss knows of
    said = f"By {format_lr(rate)} the loss had done {DONE:.0%} of its descent, from {top:.3g} to {low:.3g}"
    if still_falling:
        return rate, f"{said}, and it was still falling at the end of the range: a higher --to may find a higher rate."
    return rate, f"{said} at {format_lr(lrs[lowest])}; higher rates bring little more or spoil it."


def lr_grid(
    experiment: Experiment,
    lrs: Sequence[float] | FloatArray,
    *,
    n_steps: int = 50,
    n_items: int = 32,
    stop: StopRequest | None = None,
    progress: ProgressCallback = lambda _done, _text: None,
) -> LrGrid:
    """Train for a few steps with each learning rate, from the same weights on the same mixtures, and compare the ends.

    Optimizer, clipper and transforms are the recipe's; its schedule, loss filters and average take no part.

    Args:
        experiment: Its recipe, weights and mixtures.
        lrs: Ascending, ``(rate,)``.
        n_steps: Of each training.
        n_items: How many of the training mixtures each is judged by afterwards, by their mean loss.
        stop: Ends it early, with the rates that are through.
        progress: Is told how many rates are done, in parts of one, and which is under way.

    Raises:
        RecipeError: As `lr_range`.
    """
    probe = with_constant_lr(experiment)
    fixed, losses = probe.fixed_batches(n_items), list[float]()
    for place, lr in enumerate(map(float, lrs)):
        state = probe.new_state()
        set_learning_rate(state, lr)
        for done, parts in enumerate(islice(probe.training_batches(), n_steps)):
            if stop is not None and stop.signal:
                return LrGrid(np.array(lrs)[:place], np.array(losses), n_steps, n_items)
            train_step(state, parts)
            progress(place + (done + 1) / n_steps, f"lr {format_lr(lr)}")
        losses.append(_judged(state, fixed))
    return LrGrid(np.array(lrs), np.array(losses), n_steps, n_items)


def _judged(state: TrainState, fixed: Sequence[Batch]) -> float:
    state.unwrapped_model.eval()
    with torch.no_grad(), evaluation_weights(state):
        return float(mean_loss(state.unwrapped_model, state.loss, state.precision, fixed))


def lrs_around(lr: float, *, decades: float = 1.5, a_decade: int = 2) -> FloatArray:
    """Learning rates on the grid of ``a_decade`` a decade that lie about one, ``(rate,)``."""
    middle = round(a_decade * np.log10(lr))
    reach = round(a_decade * decades)
    return 10.0 ** (np.arange(middle - reach, middle + reach + 1) / a_decade)


def format_lr(lr: float) -> str:
    """A learning rate as one writes it in a recipe: 0.0032 is ``3.2e-3``, 0.01 is ``1e-2``."""
    digits, exponent = f"{lr:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"
