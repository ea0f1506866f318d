"""Models, losses and training steps of unbraid and of the peers, in equal sizes, each run as its own users run it."""

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

LR = 1.5e-4
MAX_NORM = 5.0

Call = Callable[[], object]


def missing(packages: Iterable[str]) -> list[str]:
    """Return the packages that cannot be imported; sources unpacked in the environment's ``src`` count as installed."""
    for folder in sorted((Path(sys.prefix) / "src").glob("*")):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return [name for name in sorted(packages) if importlib.util.find_spec(name) is None]


class Work(NamedTuple):
    """A network that both sides have, and the size of its batches."""

    model: str
    """Name in `MODELS` and in `PEERS`."""
    options: dict[str, Any]
    """Sizes, under the names of our model; both networks are built from them."""
    batch_size: int
    seconds: float
    sample_rate: int = 8000
    n_channels: int = 1
    n_sources: int = 2

    def batch(self, device: torch.device) -> Batch:
        """Return a batch of noise: the values make no difference to the time."""
        rng = torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.n_sources, self.n_channels, round(self.seconds * self.sample_rate))
        sources = 0.1 * torch.randn(shape, generator=rng)
        return Batch.from_tensors(sources.sum(1), sources).to(device)


class Peer(NamedTuple):
    """A network of another toolkit, with the loss of the same toolkit."""

    who: str
    build: Callable[..., nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    """None if only inference is compared."""


class PeerAdapter(nn.Module):
    """A peer's network with our shapes: ``(batch, channel, time)`` to ``(batch, source, channel, time)``.

    Args:
        net: The network.
        enter: Einops pattern from our mixture to its input.
        leave: Einops pattern from its output to our estimate.
    """

    def __init__(self, net: nn.Module, *, enter: str, leave: str) -> None:
        super().__init__()
        self.net = net
        self.enter = enter
        self.leave = leave

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate a mixture."""
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
    """Build SpeechBrain's SepFormer, with encoder and decoder."""
    from speechbrain.lobes.models.dual_path import SepformerWrapper

    both = {"numlayers": n_layers, "nhead": n_heads, "dffn": d_hidden}
    net = SepformerWrapper(
        encoder_out_nchannels=n_filters,
        masknet_chunksize=chunk_size,
        masknet_numlayers=n_blocks,
        **{f"{path}_{name}": size for path in ("intra", "inter") for name, size in both.items()},
    )
    return PeerAdapter(net, enter="b 1 t -> b t", leave="b t s -> b s 1 t")


def speechbrain_loss(estimate: Tensor, sources: Tensor) -> Tensor:
    """Return the loss of SpeechBrain's recipe."""
    from speechbrain.nnet.losses import get_si_snr_with_pitwrapper

    signals_last = [rearrange(signals, "b s 1 t -> b t s") for signals in (sources, estimate)]
    return get_si_snr_with_pitwrapper(*signals_last).mean()


def asteroid_conv_tasnet(
    *,
    n_filters: int = 512,
    bottleneck: int = 128,
    hidden: int = 512,
    skip: int = 128,
    n_blocks: int = 8,
    n_repeats: int = 3,
) -> nn.Module:
    """Build Asteroid's Conv-TasNet."""
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
    return PeerAdapter(net, enter="b c t -> b c t", leave="b s t -> b s 1 t")


def asteroid_loss(estimate: Tensor, sources: Tensor) -> Tensor:
    """Return the loss of Asteroid's recipes."""
    from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr

    return PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")(estimate[:, :, 0], sources[:, :, 0])


def asteroid_dprnn(
    *, n_filters: int = 64, bottleneck: int = 128, hidden: int = 128, chunk_size: int = 100, n_blocks: int = 6
) -> nn.Module:
    """Build Asteroid's DPRNN."""
    from asteroid.models import DPRNNTasNet

    net = DPRNNTasNet(
        n_src=2, n_filters=n_filters, bn_chan=bottleneck, hid_size=hidden, chunk_size=chunk_size, n_repeats=n_blocks
    )
    return PeerAdapter(net, enter="b c t -> b c t", leave="b s t -> b s 1 t")


def package_bs_roformer(
    *, d_model: int = 384, n_blocks: int = 6, n_heads: int = 8, d_head: int = 48, hop_length: int = 441
) -> nn.Module:
    """Build the BS-RoFormer of the package bs_roformer as published: one residual stream, one layer per axis."""
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
    return PeerAdapter(net, enter="b c t -> b c t", leave="b c t -> b 1 c t")


PEERS = {
    "sepformer": Peer("speechbrain", speechbrain_sepformer, speechbrain_loss),
    "conv_tasnet": Peer("asteroid", asteroid_conv_tasnet, asteroid_loss),
    "dprnn": Peer("asteroid", asteroid_dprnn, asteroid_loss),
    "bs_roformer": Peer("bs_roformer", package_bs_roformer),
}


def build(work: Work, device: torch.device, *, ours: bool, compiled: bool = False, **more: Any) -> nn.Module:
    """Build our network or the peer's; ours may be compiled, in the way of `unbraid train`."""
    if not ours:
        return PEERS[work.model].build(**work.options).to(device)
    model = MODELS[work.model](n_sources=work.n_sources, **work.options, **more).to(device)
    if compiled:
        compile_model(model, device)
    return model


def offers(work: Work, option: str) -> bool:
    """Return True if our network has an option of this name."""
    return option in inspect.signature(MODELS[work.model]).parameters


def our_step(model: nn.Module, precision: str, batch: Batch) -> Call:
    """Return our training step, with the settings of our recipes."""
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
    """Return the training step that the peers' loops share: their loss, PyTorch's clipping, Adam with its defaults."""
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
    """Return a forward pass without gradients."""
    autocast = Precision(precision).autocast
    model.eval()

    def run() -> None:
        with torch.inference_mode(), autocast(batch.mixture.device):
            model(batch.mixture)

    return run
