"""Whole recordings through a model: any rate, any channel count, back at exactly the length they came in."""

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.dsp import fit_length, resample
from unbraid.metrics import best_assignment, pairwise_si_sdr, reorder
from unbraid.model_output import ModelOutput, get_sources
from unbraid.type_aliases import AudioArray


def separate(model: nn.Module, mixture: Tensor) -> Tensor:
    """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``, as `infer` does."""
    return get_sources(infer(model, mixture))


def infer(model: nn.Module, mixture: Tensor) -> Tensor | ModelOutput:
    """What a model returns for ``(batch, channel, time)``, its sources in float32 on the model's device.

    Without gradients, in evaluation mode, and never compiled for it: a new length would compile anew.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            output = model(mixture.to(device, torch.float32))
            return (
                output._replace(sources=output.sources.float()) if isinstance(output, ModelOutput) else output.float()
            )
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
    """Separate a recording at its own rate.

    Args:
        model: A separator.
        audio: ``(channel, time)``; channels are separated each for itself, and keep their sources together.
        sample_rate: Of the recording, in Hz; what the model's rate cannot carry is lost.
        model_rate: What the model was trained at, in Hz.
        match_level: Whether the model leaves levels open, so that they are taken from the mixture.
        fixed_order: Whether each output has its own source, in every channel; so too where all channels go in at once.
        silent_below_db: As `at_mixture_level` takes it.

    Returns:
        ``(source, channel, time)`` at ``sample_rate``, as long as the recording.
    """
    if audio.shape[-1] == 0:
        return np.zeros((getattr(model, "n_sources", 1), *audio.shape), np.float32)
    mixture = resample(audio, sample_rate, model_rate)
    found = separate(model, torch.from_numpy(mixture)[None])
    if not fixed_order and getattr(model, "n_channels", 1) == 1:
        found = same_source_in_every_channel(found)
    estimates = found[0].cpu().numpy()
    if match_level:
        estimates = at_mixture_level(estimates, mixture, silent_below_db=silent_below_db)
    back = [fit_length(resample(source, model_rate, sample_rate), audio.shape[-1]) for source in estimates]
    return np.stack(back)


def same_source_in_every_channel(estimates: Tensor) -> Tensor:
    """Order each channel's sources as those of the first channel that they are most like, by SI-SDR.

    Args:
        estimates: ``(batch, source, channel, time)``.

    Returns:
        The same, reordered.
    """
    first = estimates[:, :, 0]
    channels = [estimates[:, :, c] for c in range(estimates.shape[2])]
    return torch.stack([reorder(c, best_assignment(pairwise_si_sdr(c, first))) for c in channels], 2)


def at_mixture_level(estimates: AudioArray, mixture: AudioArray, *, silent_below_db: float | None = None) -> AudioArray:
    """Give each estimate the gain, and the sign, with which all of them together come nearest to the mixture.

    A loss that does not care for scale leaves both open. Least squares over all channels and samples.

    Args:
        estimates: ``(source, channel, time)``.
        mixture: ``(channel, time)``.
        silent_below_db: So far under the loudest estimate one means silence, and becomes it: for models that were
            taught to silence outputs without a source. None where none was.

    Returns:
        As ``estimates``; silence stays silence.
    """
    flat = estimates.reshape(len(estimates), -1).astype(np.float64)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    if silent_below_db is not None:
        flat = np.where(norms < norms.max() * 10 ** (-silent_below_db / 20), 0, flat)
        norms = np.linalg.norm(flat, axis=1, keepdims=True)
    unit = flat / np.where(norms > 0, norms, 1)
    gains = np.linalg.lstsq(unit @ unit.T, unit @ mixture.reshape(-1).astype(np.float64), rcond=1e-6)[0]
    return (unit * gains[:, None]).reshape(estimates.shape).astype(np.float32)
