"""The validation pass says what it was like for each item, in the items' order."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from toys import make_state

from unbraid.data.dataset import DataSettings, Example, Key, make_dataset
from unbraid.data.folders import list_speakers
from unbraid.data.mixing import Mixture
from unbraid.data.splits import assign_splits
from unbraid.losses.pit import SeparationLoss
from unbraid.losses.waveform import neg_snr
from unbraid.metrics import si_sdr
from unbraid.records import ItemId
from unbraid.train.validate import make_validator

N_ITEMS = 7


@pytest.fixture
def dataset(speaker_folder):
    folder = speaker_folder()
    tracks = assign_splits(list_speakers(folder), n_sources=2)
    return make_dataset(tracks, DataSettings(path=folder, excerpt_seconds=0.5), "valid")


def test_order_and_improvement_of_each_item_are_those_of_its_own_mixture(dataset):
    state = make_state()
    wanted_orders, wanted = [], []
    for index in range(N_ITEMS):
        audio = dataset[Key(0, index)].audio
        mixture, sources = torch.from_numpy(audio.mixture)[None], torch.from_numpy(audio.sources)
        with torch.no_grad():
            outputs = state.model(mixture)[0]
        scores = {order: si_sdr(outputs[list(order)], sources).mean().item() for order in ((0, 1), (1, 0))}
        wanted_orders.append(max(scores, key=scores.get))
        wanted.append(max(scores.values()) - si_sdr(mixture.expand_as(sources), sources).mean().item())

    for batch_size in (3, N_ITEMS):
        scores = make_validator(dataset, n_items=N_ITEMS, batch_size=batch_size)(state)

        assert list(scores.orders) == wanted_orders
        assert scores.item_si_sdri == pytest.approx(wanted, abs=2e-3)
        assert sum(scores.item_si_sdri) / N_ITEMS == pytest.approx(scores.si_sdri, abs=2e-3)


@pytest.mark.parametrize("assign", ["fixed", "mixit"])
def test_a_loss_without_assignment_records_no_order(dataset, assign):
    state = make_state(loss=SeparationLoss(neg_snr, assign=assign))

    scores = make_validator(dataset, n_items=N_ITEMS, batch_size=4, assign=assign)(state)

    assert scores.orders == ()
    assert len(scores.item_si_sdri) == N_ITEMS


def test_an_item_without_a_value_is_recorded_as_none(dataset):
    class NanForLoudest(nn.Module):
        def forward(self, mixture):
            power = mixture.square().mean((1, 2), keepdim=True)
            return torch.where(power == power.max(), torch.nan, mixture)[:, None].expand(-1, 2, -1, -1)

    state = make_state()
    state.model.forward = NanForLoudest().forward

    scores = make_validator(dataset, n_items=N_ITEMS, batch_size=N_ITEMS)(state)

    assert scores.item_si_sdri.count(None) == 1
    assert scores.loss != scores.loss
    assert scores.si_sdri != scores.si_sdri  # the model's fault must show
    assert scores.n_undefined == 0


class Fixed(Dataset):
    """Four mixtures of two sources: an ordinary one, one source alone, silence, and an ordinary one."""

    settings = DataSettings(n_sources=2)

    def __getitem__(self, key):
        rng = np.random.default_rng(key.index)
        sources = 0.1 * rng.standard_normal((2, 1, 4000), dtype=np.float32)
        sources[1:] *= key.index != 1
        sources *= key.index != 2
        return Example(Mixture(sources.sum(0), sources, None), ItemId("valid", 0, key.index), 1.0, ())


def test_values_without_meaning_do_not_count_in_the_means():
    state = make_state(loss=SeparationLoss(neg_snr))
    ordinary = make_validator(Fixed(), n_items=1, batch_size=1)(state)

    scores = make_validator(Fixed(), n_items=3, batch_size=3)(state)

    # The source of example 1 is alone in its mixture, and example 2 is silence: neither can be improved on.
    assert scores.item_si_sdri[1:] == (None, None)
    assert scores.si_sdri == pytest.approx(ordinary.si_sdri, abs=1e-4)
    assert -60 < scores.si_sdr < 60
    assert (scores.n_items, scores.n_undefined) == (3, 2)


def test_without_any_improvable_mixture_there_is_no_improvement():
    class Silence(Fixed):
        def __getitem__(self, key):
            return super().__getitem__(replace(key, index=2))._replace(item=ItemId("valid", 0, key.index))

    scores = make_validator(Silence(), n_items=2, batch_size=2)(make_state(loss=SeparationLoss(neg_snr)))

    assert math.isnan(scores.si_sdr)
    assert math.isnan(scores.si_sdri)
    assert scores.n_undefined == 2
