"""Learning-rate range test and grid: which learning rate a recipe should start with, from its own model and mixtures.

The learning rate grows by a constant factor from step to step until the loss diverges or the range ends. Too low a
rate changes nothing, too high a rate undoes what was reached. In between the loss falls, and the test suggests the rate
at which it has fallen.
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

MIN_BASELINE_STEPS = 20
"""Least number of first steps that define the noise of the loss. With five, noise alone makes a suggestion in one test
of five."""
MIN_STEPS = 3 * MIN_BASELINE_STEPS
"""With fewer steps too little of the range is left after the baseline."""
DESCENT_SHARE = 0.98
"""The suggestion is where the loss has made this share of its descent. The minimum itself is no good mark: the floor is
flat, so its position is chance. The steepest descent is none either: it lies a factor of ten or more below the best
rate of a grid."""
DIVERGED_SHARE = 0.5
"""A loss has diverged once it has given back this share of its descent."""
N_NONFINITE_STEPS = 5
"""A loss has also diverged after this many steps in a row without a finite loss and gradient."""
NOISE_FACTOR = 4.0
"""A change counts as chance below this many standard deviations of single losses at rates that change nothing."""


@dataclass(frozen=True)
class RangeStep:
    """One step of a range test.

    Attributes:
        loss: Loss before the step; it reflects the learning rates of the steps before.
        grad_norm: Gradient norm before clipping.
        update_ratio: Norm of the update over the norm of all weights.
    """

    loss: float
    grad_norm: float
    update_ratio: float


@dataclass(frozen=True)
class RangeTest:
    """Result of a range test. All arrays are ``(step,)``, with NaN where a step had no finite value.

    Attributes:
        name: Name of the experiment.
        optimizer: Name of the optimizer in the recipe.
        clipper: Name of the clipper in the recipe.
        lrs: Learning rate of each step made.
        losses: Loss before each step, on mixtures that no other step uses.
        smoothed_capped: The losses averaged over neighbouring steps and capped at the start; see `smooth_losses`.
        grad_norms: Gradient norms before clipping.
        update_ratios: Norm of each update over the norm of the weights.
        stop_reason: A sentence on why the test ended.
        suggestion: The suggested learning rate, with two digits; None without a suggestion.
        reason: One or two sentences on the suggestion.
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
    """Result of short trainings from the same weights on the same mixtures, each with one learning rate.

    Attributes:
        lrs: Ascending, ``(rate,)``.
        losses: Mean loss over fixed mixtures afterwards, ``(rate,)``; may be NaN or infinite.
        n_steps: Number of steps of each training.
        n_items: Number of mixtures that each is evaluated on.
    """

    lrs: FloatArray
    losses: FloatArray
    n_steps: int
    n_items: int

    @property
    def best(self) -> float | None:
        """Learning rate with the lowest loss; None if no loss is finite."""
        is_finite = np.isfinite(self.losses)
        return float(self.lrs[np.where(is_finite, self.losses, np.inf).argmin()]) if is_finite.any() else None


def learning_rates(start: float = 1e-7, end: float = 10.0, n_steps: int = 200) -> FloatArray:
    """Return learning rates that grow by a constant factor from step to step, ``(step,)``.

    Raises:
        UserError: If the range is empty or has too few steps.
    """
    if not 0 < start < np.inf or not 0 < end < np.inf:
        raise UserError(f"Learning rates must be above 0 and finite, not --from {start:g} --to {end:g}.")
    if start >= end:
        raise UserError(f"--from {start:g} must be below --to {end:g}.")
    if n_steps < MIN_STEPS:
        raise UserError(f"--steps {n_steps} is too few to show a trend; use {MIN_STEPS} or more.")
    return np.geomspace(start, end, n_steps)


def lr_range(
    experiment: Experiment,
    lrs: FloatArray | None = None,
    *,
    stop: StopRequest | None = None,
    progress: ProgressCallback = lambda _done, _text: None,
) -> RangeTest:
    """Test a range of learning rates on a copy of the experiment's model, one step with each.

    The optimizer, clipper and transforms are the recipe's. Its schedule, loss filters and EMA are not used.

    Args:
        experiment: Experiment with the recipe, the weights and the mixtures.
        lrs: Ascending, ``(step,)``; None for the default of `learning_rates`.
        stop: Ends the test early, with the steps made so far.
        progress: Receives the number of steps done, and a line about the last one.

    Raises:
        RecipeError: If a component of the recipe cannot be used, or its optimizer has no learning rate to set.

    Reference:
        Smith, "Cyclical learning rates for training neural networks", WACV 2017, arXiv:1506.01186. The exponential
        growth and the rule for the suggestion differ.
    """
    lrs = learning_rates() if lrs is None else lrs
    experiment = with_constant_lr(experiment)
    state = experiment.new_state()
    batches = experiment.training_batches()

    def take_step(lr: float) -> RangeStep:
        return measure_step(state, next(batches), lr)

    steps, stop_reason, diverged = run_range_test(take_step, lrs, stop=stop, progress=progress)
    losses = np.array([step.loss for step in steps])
    suggestion, reason = suggest_lr(lrs[: len(steps)], losses, n_planned=len(lrs), diverged=diverged)
    return RangeTest(
        experiment.name,
        experiment.recipe.optim.name,
        experiment.recipe.clip.name,
        lrs[: len(steps)],
        losses,
        smooth_losses(losses, n_baseline_steps(len(lrs))),
        np.array([step.grad_norm for step in steps]),
        np.array([step.update_ratio for step in steps]),
        stop_reason,
        suggestion,
        reason,
    )


def with_constant_lr(experiment: Experiment) -> Experiment:
    """Return the experiment with a constant learning rate of 1, to be multiplied, and no loss filters and no EMA."""
    recipe = experiment.recipe
    recipe = replace(
        recipe,
        optim=replace(recipe.optim, options={**recipe.optim.options, "lr": 1.0}),
        schedule=Component("constant"),
        filters=(),
        train=replace(recipe.train, ema=0.0),
    )
    return replace(experiment, recipe=recipe)


def measure_step(state: TrainState, micro_batches: Sequence[Batch], lr: float) -> RangeStep:
    """Take a training step with a learning rate and measure the update.

    Args:
        state: Training state with a learning rate of 1; it is changed.
        micro_batches: Micro-batches of the step.
        lr: Learning rate of the first parameter group; other groups keep their ratio to it.
    """
    # detach shares memory: weights follow the step, the clones do not.
    weights = [p.detach() for p in state.unwrapped_model.parameters()]
    before = [weight.clone() for weight in weights]
    set_learning_rate(state, lr)
    record = train_step(state, micro_batches)
    update_norm = nn.utils.get_total_norm(torch._foreach_sub(weights, before))
    update_ratio = float(update_norm / nn.utils.get_total_norm(before))
    # A skipped step has a loss too, but not one that the test may use.
    loss = record.loss if record.trained else None
    return RangeStep(_finite_or_nan(loss), _finite_or_nan(record.grad_norm), _finite_or_nan(update_ratio))


def _finite_or_nan(value: float | None) -> float:
    return value if value is not None and np.isfinite(value) else np.nan


def run_range_test(
    take_step: Callable[[float], RangeStep],
    lrs: FloatArray,
    *,
    stop: StopRequest | None = None,
    progress: ProgressCallback = lambda _done, _text: None,
) -> tuple[list[RangeStep], str, bool]:
    """Take a step with each learning rate in turn until the loss diverges.

    Args:
        take_step: Takes a step with a learning rate.
        lrs: Ascending, ``(step,)``.
        stop: Ends the test early.
        progress: Receives the number of steps done, and a line about the last one.

    Returns:
        The steps, a sentence on why the test ended, and whether the loss diverged.
    """
    steps: list[RangeStep] = []
    for lr in map(float, lrs):
        if stop is not None and stop.signal:
            return steps, f"It was interrupted before {format_lr(lr)}.", False
        steps.append(take_step(lr))
        progress(len(steps), f"lr {format_lr(lr)}  loss {steps[-1].loss:.3g}")
        reason = divergence_reason(np.array([step.loss for step in steps]), len(lrs))
        if reason:
            return steps, f"At {format_lr(lr)} {reason}.", True
    return steps, f"The range went up to {format_lr(lrs[-1])}, and the loss did not diverge.", False


def divergence_reason(losses: FloatArray, n_planned: int) -> str:
    """Return the reason to say that the loss has diverged; an empty string if it has not.

    A loss diverges if it gives back half of its descent (`DIVERGED_SHARE`) by more than chance. Mixtures differ, so
    losses differ even at rates that change nothing; these measure chance. The descent is the only reliable scale:
    SI-SDR ignores the level, so even a model that is far off keeps a finite loss that is not particularly high.

    Args:
        losses: Losses so far, ``(step,)``; NaN for skipped steps.
        n_planned: Number of steps of the whole range.
    """
    if len(losses) >= N_NONFINITE_STEPS and not np.isfinite(losses[-N_NONFINITE_STEPS:]).any():
        return f"{N_NONFINITE_STEPS} steps in a row had a loss or gradient that is not finite"
    finite = losses[np.isfinite(losses)]
    n_baseline = n_baseline_steps(n_planned)
    if len(finite) <= n_baseline:
        return ""
    # Running means over at least five steps: a single loss differs too much from mixture to mixture.
    means = running_mean(finite, max(5, n_planned // 20))[n_baseline - 1 :]
    start = finite[:n_baseline].mean()
    lowest = means.min()
    last = means[-1]
    chance = NOISE_FACTOR * loss_noise(finite, n_baseline)
    if last - lowest <= max(DIVERGED_SHARE * (start - lowest), chance):
        return ""
    if start - lowest <= chance:
        return f"the loss had risen to {last:.3g} from {start:.3g}, and had never fallen before"
    return f"the loss was back at {last:.3g}, after it had fallen from {start:.3g} to {lowest:.3g}"


def n_baseline_steps(n_planned: int) -> int:
    """Return the number of first steps that define the start and the noise of the loss: a tenth, 20 or more."""
    return max(MIN_BASELINE_STEPS, n_planned // 10)


def loss_noise(losses: FloatArray, n_baseline: int) -> float:
    """Return the standard deviation of the loss between mixtures, from differences of successive baseline steps."""
    # Differences, so that a slow trend does not count; each has twice the variance of a single loss.
    return float(np.diff(losses[:n_baseline]).std(ddof=1) / np.sqrt(2))


def smooth_losses(losses: FloatArray, n_baseline: int) -> FloatArray:
    """Return the losses averaged with their neighbours by a Gaussian of 3 % of the steps, ``(step,)``.

    Losses are capped at the highest of the baseline first. Otherwise one loss that explodes would hide how low its
    neighbours are. The curve is therefore flat where the loss has diverged.

    Args:
        losses: ``(step,)``; values that are not finite have no weight, and become NaN.
        n_baseline: Number of baseline steps; see `n_baseline_steps`.
    """
    # The cap is the highest loss of the baseline, which is the start of the descent.
    is_finite = np.isfinite(losses)
    cap = losses[is_finite][:n_baseline].max(initial=-np.inf)
    capped = np.where(is_finite, np.minimum(losses, cap), 0.0)
    # Normalised convolution: smooth values and weights, so that gaps and ends do not pull towards 0.
    width = max(0.7, 0.03 * len(losses))
    sums = gaussian_filter1d(capped, width, mode="constant")
    weights = gaussian_filter1d(is_finite * 1.0, width, mode="constant")
    return np.where(is_finite, sums / np.maximum(weights, np.finfo(float).tiny), np.nan)


def suggest_lr(
    lrs: FloatArray, losses: FloatArray, *, n_planned: int | None = None, diverged: bool = False
) -> tuple[float | None, str]:
    """Return the learning rate at which the smoothed loss has made most of its descent (`DESCENT_SHARE`), and why.

    The rule was compared with the best rate of a grid of half decades, 40 steps each. It was chosen on the following
    cases, which therefore do not test it: a small Conv-TasNet and BLSTM with three seeds each. All twelve cases of Adam
    and Muon were within a factor of 2.7. Of fifteen cases of SGD (clipped, not clipped, with momentum), seven were
    within a factor of 3. Eight were below the best rate, by a factor of 7 at the median and 17 at most, where the grid
    is flat over more than a decade of rates. On other cases, one seed each, the suggestion was these multiples of the
    best rate: DPRNN 2.0, SepFormer 3.1, TF-Locoformer with AdamW 0.46, a larger Conv-TasNet with Adam 2.2, Muon 1.2,
    RMSprop 0.7, schedule-free 0.19, and with Adam by the loss neg_snr 0.57, l1 3.2, with AutoClip 6.2.

    Args:
        lrs: Ascending, ``(step,)``.
        losses: Loss before the step with each rate, ``(step,)``; NaN for skipped steps.
        n_planned: Number of steps of the whole range; None if all were made.
        diverged: Whether the loss diverged at the last step. Without it, fewer steps than planned were interrupted.

    Returns:
        The learning rate with two digits and a sentence; None and a sentence on what to do if the test is
        inconclusive.
    """
    # 1. Set aside what cannot give a suggestion: too few steps, or no descent beyond chance.
    n_planned = len(lrs) if n_planned is None else n_planned
    n_baseline = n_baseline_steps(n_planned)
    interrupted = not diverged and len(lrs) < n_planned
    is_finite = np.isfinite(losses)
    lrs = lrs[is_finite]
    losses = losses[is_finite]
    if len(losses) < 1.5 * n_baseline:
        advice = f": start lower than --from {format_lr(lrs[0])}" if diverged and len(lrs) else ""
        return None, f"Only {len(losses)} steps have a finite loss, too few for a suggestion{advice}."
    smoothed = smooth_losses(losses, n_baseline)
    lowest = int(smoothed.argmin())
    start_loss = float(losses[:n_baseline].mean())
    lowest_loss = float(smoothed[lowest])
    descent = start_loss - lowest_loss
    if descent <= NOISE_FACTOR * loss_noise(losses, n_baseline) / 2:
        return None, (
            f"The loss never fell from {start_loss:.3g} by more than mixtures differ: use more --steps, or a larger "
            "data.batch_size."
        )

    # 2. Set aside a descent that began before the range, or had not ended when the test was stopped.
    halfway = int(np.argmax(smoothed <= start_loss - 0.5 * descent))
    if halfway < n_baseline:
        return None, (
            f"The loss had already fallen at {format_lr(lrs[halfway])}: start lower than --from {format_lr(lrs[0])}."
        )
    still_falling = not diverged and lowest >= len(losses) - n_baseline / 2
    if still_falling and interrupted:
        return None, (
            f"The loss had fallen from {start_loss:.3g} to {lowest_loss:.3g}, and was still falling when the test was "
            "stopped."
        )

    # 3. Suggest. A loss is computed before its step, so it reflects the learning rate of the step before.
    reached = int(np.argmax(smoothed <= start_loss - DESCENT_SHARE * descent))
    lr = float(f"{lrs[reached - 1]:.1e}")
    reason = (
        f"At {format_lr(lr)} the loss had made {DESCENT_SHARE:.0%} of its descent, from {start_loss:.3g} to "
        f"{lowest_loss:.3g}"
    )
    if still_falling:
        return lr, f"{reason}, and it was still falling at the end of the range: a higher --to may find a higher rate."
    return lr, f"{reason} at {format_lr(lrs[lowest])}; higher rates gain little or undo it."


def lr_grid(
    experiment: Experiment,
    lrs: Sequence[float] | FloatArray,
    *,
    n_steps: int = 50,
    n_items: int = 32,
    stop: StopRequest | None = None,
    progress: ProgressCallback = lambda _done, _text: None,
) -> LrGrid:
    """Train for a few steps with each learning rate, from the same weights on the same mixtures, and compare.

    The optimizer, clipper and transforms are the recipe's. Its schedule, loss filters and EMA are not used.

    Args:
        experiment: Experiment with the recipe, the weights and the mixtures.
        lrs: Ascending, ``(rate,)``.
        n_steps: Number of steps of each training.
        n_items: Number of training mixtures that each is evaluated on afterwards, by their mean loss.
        stop: Ends the grid early, with the rates completed so far.
        progress: Receives the number of rates done, with fractions, and a line of text.

    Raises:
        RecipeError: As `lr_range`.
    """
    experiment = with_constant_lr(experiment)
    fixed = experiment.fixed_batches(n_items)
    losses: list[float] = []
    for index, lr in enumerate(map(float, lrs)):
        # A fresh state: every rate starts from the same weights with an empty optimizer.
        state = experiment.new_state()
        set_learning_rate(state, lr)
        for n_done, micro_batches in enumerate(islice(experiment.training_batches(), n_steps), start=1):
            if stop is not None and stop.signal:
                return LrGrid(np.array(lrs)[:index], np.array(losses), n_steps, n_items)
            train_step(state, micro_batches)
            progress(index + n_done / n_steps, f"lr {format_lr(lr)}")
        state.unwrapped_model.eval()
        with torch.no_grad(), evaluation_weights(state):
            losses.append(float(mean_loss(state.unwrapped_model, state.loss, state.precision, fixed)))
    return LrGrid(np.array(lrs), np.array(losses), n_steps, n_items)


def lrs_around(lr: float, *, decades: float = 1.5, per_decade: int = 2) -> FloatArray:
    """Return learning rates on a grid of ``per_decade`` a decade, up to ``decades`` below and above, ``(rate,)``."""
    # Round in the logarithm, so that the grid holds round numbers such as 1e-3 and not multiples of the rate itself.
    middle = round(per_decade * np.log10(lr))
    reach = round(per_decade * decades)
    return 10.0 ** (np.arange(middle - reach, middle + reach + 1) / per_decade)


def format_lr(lr: float) -> str:
    """Return a learning rate as recipes write it: ``3.2e-3`` for 0.0032, ``1e-2`` for 0.01."""
    digits, exponent = f"{lr:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"
