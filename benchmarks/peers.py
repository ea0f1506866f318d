"""Models, losses and steps of ours and of the peers, of the same sizes, each run as its own users run it."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from unbraid.compilation import compile_model
from unbraid.data.batch import Batch
from unbraid.losses.pit import SeparationLoss
from unbraid.losses.waveform import neg_si_sdr
from unbraid.models import MODELS
from unbraid.robust.clip import FixedClip
from unbraid.robust.filter import ThresholdFilter
from unbraid.robust.precision import Precision
from unbraid.train.optim import OPTIMIZERS
from unbraid.train.state import TrainState
from unbraid.train.step import train_step

LR, MAX_NORM = 1.5e-4, 5.0

Call = Callable[[], object]


def missing(packages: Iterable[str]) -> list[str]:
    """Those that are not here; sources unpacked in the environment's ``src`` are found too."""
    for folder in sorted((Path(sys.prefix) / "src").glob("*")):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return [name for name in sorted(packages) if importlib.util.find_spec(name) is None]


class Work(NamedTuple):
    """A network that both have, and the size of its batches."""

    model: str
    """Its name in `MODELS` and in `PEERS`."""
    options: dict[str, Any]
    """Its sizes, by the names that ours has for them; both are built from them."""
    batch_size: int
    seconds: float
    sample_rate: int = 8000
    n_channels: int = 1
    n_sources: int = 2

    @property
    def is_there(self) -> bool:
        """Whether ours has it."""
        return self.model in MODELS

    def batch(self, device: torch.device) -> Batch:
        """Noise: what the numbers are makes no difference to the time."""
        rng = torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.n_sources, self.n_channels, round(self.seconds * self.sample_rate))
        sources = 0.1 * torch.randn(shape, generator=rng)
        return Batch.from_tensors(sources.sum(1), sources).to(device)


class Peer(NamedTuple):
    """Somebody else's network, with the loss of the same house."""

    who: str
    build: Callable[..., nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    """None where only inference is compared."""


class AsOurs(nn.Module):
    """A peer's network behind our shapes: ``(batch, channel, time)`` to ``(batch, source, channel, time)``.

    Args:
        net: The network.
        enter: Our mixture as it wants it, an einops pattern.
        leave: What it returns as we want it, an einops pattern.
    """

    def __init__(self, net: nn.Module, *, enter: str, leave: str) -> None:
        super().__init__()
        self.net, self.enter, self.leave = net, enter, leave

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate."""
        return rearrange(self.net(rearrange(mixture, self.enter)), self.leave)


def speechbrain_sepformer(
    *,
    n_filters: int = 256,
    chunk_size: int = 250,
    n_blocks: int = 2,
    n_layers: int = 8,
    n_heads: int = 8,
    d_hidden: int = 1024,
) -> nn.Module:
    """The whole SepFormer of SpeechBrain."""
    from speechbrain.lobes.models.dual_path import SepformerWrapper

    both = {"numlayers": n_layers, "nhead": n_heads, "dffn": d_hidden}
    net = SepformerWrapper(
        encoder_out_nchannels=n_filters,
        masknet_chunksize=chunk_size,
        masknet_numlayers=n_blocks,
        **{f"{path}_{name}": size for path in ("intra", "inter") for name, size in both.items()},
    )
    return AsOurs(net, enter="b 1 t -> b t", leave="b t s -> b s 1 t")


def speechbrain_loss(estimate: Tensor, sources: Tensor) -> Tensor:
    """What its recipe trains with."""
    from speechbrain.nnet.losses import get_si_snr_with_pitwrapper

    heard = [rearrange(signals, "b s 1 t -> b t s") for signals in (sources, estimate)]
    return get_si_snr_with_pitwrapper(*heard).mean()


def asteroid_conv_tasnet(
    *,
    n_filters: int = 512,
    bottleneck: int = 128,
    hidden: int = 512,
    skip: int = 128,
    n_blocks: int = 8,
    n_repeats: int = 3,
) -> nn.Module:
    """Asteroid's Conv-TasNet."""
    from asteroid.models import ConvTasNet

    net = ConvTasNet(
        n_src=2,
        n_filters=n_filters,
        bn_chan=bottleneck,
        hid_chan=hidden,
        skip_chan=skip,
        n_blocks=n_blocks,
        n_repeats=n_repeats,
    )
    return AsOurs(net, enter="b c t -> b c t", leave="b s t -> b s 1 t")


def asteroid_loss(estimate: Tensor, sources: Tensor) -> Tensor:
    """What its recipes train with."""
    from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr

    return PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")(estimate[:, :, 0], sources[:, :, 0])


def asteroid_dprnn(
    *, n_filters: int = 64, bottleneck: int = 128, hidden: int = 128, chunk_size: int = 100, n_blocks: int = 6
) -> nn.Module:
    """Asteroid's DPRNN."""
    from asteroid.models import DPRNNTasNet

    net = DPRNNTasNet(
        n_src=2, n_filters=n_filters, bn_chan=bottleneck, hid_size=hidden, chunk_size=chunk_size, n_repeats=n_blocks
    )
    return AsOurs(net, enter="b c t -> b c t", leave="b s t -> b s 1 t")


def package_bs_roformer(
    *, d_model: int = 384, n_blocks: int = 6, n_heads: int = 8, d_head: int = 48, hop_length: int = 441
) -> nn.Module:
    """The BS-RoFormer of the package of that name, in the published form: one residual stream, one layer an axis."""
    from bs_roformer import BSRoformer

    net = BSRoformer(
        dim=d_model,
        depth=n_blocks,
        heads=n_heads,
        dim_head=d_head,
        stft_hop_length=hop_length,
        stereo=True,
        time_transformer_depth=1,
        freq_transformer_depth=1,
        num_residual_streams=1,
    )
    return AsOurs(net, enter="b c t -> b c t", leave="b c t -> b 1 c t")


PEERS = {
    "sepformer": Peer("speechbrain", speechbrain_sepformer, speechbrain_loss),
    "conv_tasnet": Peer("asteroid", asteroid_conv_tasnet, asteroid_loss),
    "dprnn": Peer("asteroid", asteroid_dprnn, asteroid_loss),
    "bs_roformer": Peer("bs_roformer", package_bs_roformer),
}


def build(work: Work, device: torch.device, *, ours: bool, compiled: bool = False, **more: Any) -> nn.Module:
    """The network of ours, or the peer's; ours may be compiled, as a training run of ours does it."""
    if not ours:
        return PEERS[work.model].build(**work.options).to(device)
    model = MODELS[work.model](n_sources=work.n_sources, **work.options, **more).to(device)
    if compiled:
        compile_model(model, device)
    return model


def offers(work: Work, option: str) -> bool:
    """Whether our network has an option of this name."""
    return option in inspect.signature(MODELS[work.model]).parameters


def our_step(model: nn.Module, precision: str, batch: Batch) -> Call:
    """One step of ours, as the recipes have it."""
    state = TrainState(
        model.train(),
        loss=SeparationLoss(neg_si_sdr),
        optimizer=OPTIMIZERS["adam"](model.parameters(), lr=LR),
        clipper=FixedClip(max_norm=MAX_NORM),
        filters=[ThresholdFilter(threshold_db=-30.0)],
        precision=Precision(precision),
    )
    return lambda: train_step(state, batch)


def peer_step(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], precision: str, batch: Batch) -> Call:
    """The step that the peers' loops have in common: their loss, torch's clipping, torch's Adam as it comes."""
    parameters = list(model.train().parameters())
    optimizer = torch.optim.Adam(parameters, lr=LR)
    autocast = Precision(precision).autocast

    def step() -> None:
        with autocast(batch.mixture.device):
            estimate = model(batch.mixture)
        loss(estimate.float(), batch.sources).backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: nn.Module, precision: str, batch: Batch) -> Call:
    """One forward, without gradients."""
    autocast = Precision(precision).autocast
    model.eval()

    def run() -> None:
        with torch.inference_mode(), autocast(batch.mixture.device):
            model(batch.mixture)

    return run
