"""Separate whole recordings of any sample rate and channel count; the output has exactly the input's length."""

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.dsp import fit_length, resample
from unbraid.metrics import best_assignment, pairwise_si_sdr, reorder
from unbraid.model_output import ModelOutput, get_sources
from unbraid.type_aliases import AudioArray


def separate(model: nn.Module, mixture: Tensor) -> Tensor:
    """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``; see `infer`."""
    return get_sources(infer(model, mixture))


def infer(model: nn.Module, mixture: Tensor) -> Tensor | ModelOutput:
    """Return a model's output for ``(batch, channel, time)``, with sources in float32 on the model's device.

    Runs without gradients, in evaluation mode, and without compiling.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        # Eager even if the model is compiled: every new length would be compiled again.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            output = model(mixture.to(device, torch.float32))
            if isinstance(output, ModelOutput):
                return output._replace(sources=output.sources.float())
            return output.float()
    finally:
        model.train(was_training)


def separate_audio(
    model: nn.Module,
    audio: AudioArray,
    sample_rate: int,
    *,
    model_rate: int,
    match_level: bool,
    fixed_order: bool = False,
    silent_below_db: float | None = None,
) -> AudioArray:
    """Separate a recording, and return it at its own sample rate.

    Args:
        model: A separator.
        audio: ``(channel, time)``; a model of one channel separates each channel on its own.
        sample_rate: Sample rate of the recording in Hz. Frequencies above half the model's rate are lost.
        model_rate: Sample rate that the model was trained at, in Hz.
        match_level: Whether to take levels from the mixture, because the model's loss does not determine them.
        fixed_order: Whether output ``i`` is always the same source. Otherwise the sources of each channel are put in
            the order of the first channel, unless the model separates all channels together.
        silent_below_db: As in `at_mixture_level`.

    Returns:
        ``(source, channel, time)`` at ``sample_rate``, as long as the recording.
    """
    if audio.shape[-1] == 0:
        return np.zeros((getattr(model, "n_sources", 1), *audio.shape), np.float32)
    mixture = resample(audio, sample_rate, model_rate)
    separated = separate(model, torch.from_numpy(mixture)[None])
    if not fixed_order and getattr(model, "n_channels", 1) == 1:
        separated = same_source_in_every_channel(separated)
    estimates = separated[0].cpu().numpy()
    if match_level:
        estimates = at_mixture_level(estimates, mixture, silent_below_db=silent_below_db)
    # Resampling there and back can change the length by a few samples.
    at_own_rate = [fit_length(resample(source, model_rate, sample_rate), audio.shape[-1]) for source in estimates]
    return np.stack(at_own_rate)


def same_source_in_every_channel(estimates: Tensor) -> Tensor:
    """Order each channel's sources like the first channel's, by the assignment with the best SI-SDR.

    Args:
        estimates: ``(batch, source, channel, time)``.

    Returns:
        The estimates in that order, of the same shape.
    """
    first = estimates[:, :, 0]
    channels = [estimates[:, :, c] for c in range(estimates.shape[2])]
    return torch.stack([reorder(c, best_assignment(pairwise_si_sdr(c, first))) for c in channels], 2)


def at_mixture_level(estimates: AudioArray, mixture: AudioArray, *, silent_below_db: float | None = None) -> AudioArray:
    """Scale each estimate so that their sum is as close to the mixture as possible; the gain may be negative.

    A scale-invariant loss determines neither level nor sign. The gains are a least-squares fit over all channels and
    samples.

    Args:
        estimates: ``(source, channel, time)``.
        mixture: ``(channel, time)``.
        silent_below_db: Set estimates to silence that are further than this below the loudest one, for models that were
            trained to silence outputs without a source. None for other models.

    Returns:
        The scaled estimates, of the same shape; silence stays silence.
    """
    flat = estimates.reshape(len(estimates), -1).astype(np.float64)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    if silent_below_db is not None:
        flat = np.where(norms < norms.max() * 10 ** (-silent_below_db / 20), 0, flat)
        norms = np.linalg.norm(flat, axis=1, keepdims=True)
    # Solve the normal equations for estimates of unit norm: the fit does not depend on how loud the model makes each.
    # rcond drops directions that only rounding distinguishes, such as two estimates that are the same.
    unit = flat / np.where(norms > 0, norms, 1)
    gains = np.linalg.lstsq(unit @ unit.T, unit @ mixture.reshape(-1).astype(np.float64), rcond=1e-6)[0]
    return (unit * gains[:, None]).reshape(estimates.shape).astype(np.float32)
