import pytest
import torch

from unbraid.models.sepformer import SepFormer, sinusoids


def tiny(**sizes):
    sizes = {"n_filters": 8, "chunk_size": 6, "n_blocks": 1, "n_layers": 1, "n_heads": 2, "d_hidden": 8} | sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SepFormer(**sizes)


def test_the_defaults_have_the_published_size():
    with torch.device("meta"):
        model = SepFormer()

    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(25.68e6, abs=0.005e6)


def test_positions_are_sines_and_cosines_of_falling_rates():
    positions = sinusoids(50, 8, torch.device("cpu"))

    place, rate = 7, 10_000 ** (-4 / 8)  # channels 4 and 5 have the third of four rates
    assert positions[place, 4].item() == pytest.approx(torch.sin(torch.tensor(place * rate)).item(), abs=1e-5)
    assert positions[place, 5].item() == pytest.approx(torch.cos(torch.tensor(place * rate)).item(), abs=1e-5)
    assert positions[0].tolist() == [0, 1] * 4


@pytest.mark.parametrize(
    "sizes", [{"n_heads": 3}, {"n_filters": 9, "n_heads": 3}, {"chunk_size": 5}, {"kernel_size": 15}]
)
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="must be even"):
        tiny(**sizes)


def test_dropout_drops_in_training_and_not_elsewhere():
    model, mixture = tiny(dropout=0.5), torch.ones(1, 1, 200)

    assert not torch.equal(model(mixture), model(mixture))
    model.eval()
    assert torch.equal(model(mixture), model(mixture))
