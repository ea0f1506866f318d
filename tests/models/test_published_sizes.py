"""Every model at its published size has the published number of parameters."""

import pytest
import torch

from unbraid.models import MODELS

PUBLISHED = [
    # name, sizes, millions as published to a digit, exactly what there is here, and who says so
    ("conv_tasnet", {}, 5.1, 5_050_545, "Luo and Mesgarani 2019, and Asteroid's ConvTasNet to the last one"),
    ("sepformer", {}, 25.7, 25_679_361, "SpeechBrain's recipe; the paper rounds to 26"),
    ("re_sepformer", {}, 8.0, 7_955_201, "Della Libera et al. 2022, arXiv:2206.09507"),
    ("dprnn", {"bottleneck": 64}, 2.6, 2_609_857, "Luo, Chen and Yoshioka 2020"),
    ("sepreformer", {"size": "T"}, 3.7, 3_711_488, "Shin et al. 2024"),
    ("sepreformer", {"size": "S"}, 4.5, 4_527_616, "Shin et al. 2024"),
    ("sepreformer", {"size": "B"}, 14.2, 14_147_840, "Shin et al. 2024"),
    ("sepreformer", {"size": "M"}, 17.3, 17_307_904, "Shin et al. 2024"),
    ("tf_locoformer", {"d_attention": 96}, 5.0, 5_026_916, "Saijo et al. 2024; the weights they gave out have 128"),
    ("tf_locoformer", {"n_layers": 6, "d_model": 128, "d_hidden": 384, "kernel_size": 4}, 15.0, 14_975_620, "the same"),
    ("tf_locoformer", {"n_layers": 9, "d_model": 128, "d_hidden": 384, "kernel_size": 4}, 22.5, 22_459_780, "the same"),
    ("bs_roformer", {}, 72.2, 72_173_292, "Lu et al. 2023, one stem of stereo, and MSST's BSRoformer to the last one"),
    ("chimera", {}, 32.9, 32_866_296, "Chimera++ in the table of Luo and Mesgarani 2019"),
    ("blstm", {}, 29.8, 29_767_716, "nobody: from the sizes of the AutoClip paper"),
]


@pytest.mark.parametrize(("name", "sizes", "millions", "exactly", "_source"), PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(name, sizes, millions, exactly, _source):
    with torch.device("meta"):
        model = MODELS[name](**sizes)

    count = sum(weight.numel() for weight in model.parameters())

    assert count == exactly
    assert count == pytest.approx(millions * 1e6, rel=0.01)


def test_every_model_has_a_published_size():
    assert {row[0] for row in PUBLISHED} == set(MODELS)
