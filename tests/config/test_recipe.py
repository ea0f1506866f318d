"""Recipes: every mistake is one sentence that names the key, says what is allowed, and offers the nearest."""

import tomllib
from pathlib import Path

import pytest
import torch

from unbraid.build import build_model, build_state
from unbraid.config.recipe import differences, load_recipe, recipe_from_table, recipe_table, to_toml
from unbraid.config.registry import build_loss
from unbraid.config.shipped_recipes import recipes_folder
from unbraid.errors import RecipeError
from unbraid.losses.waveform import l1, neg_thresholded_snr
from unbraid.models.bs_roformer import group_equal_widths, uniform_bands

SHIPPED = sorted(recipes_folder().glob("*.toml"))
ENDS = "[train]\nmax_steps = 1\n"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return path

    return write


def test_missing_keys_have_the_textbooks_defaults(write):
    recipe = load_recipe(write(ENDS))
    state = build_state(recipe, build_model(recipe), precision="fp32")

    assert type(state.optimizer).__name__ == "Adam"
    assert state.optimizer.param_groups[0]["lr"] == 1.5e-4
    assert state.clipper.max_norm == 5.0
    assert state.loss_upper_limit == 999999.0
    assert state.filters == []
    assert (recipe.data.gains_db, recipe.data.batch_size) == ((-5.0, 0.0), 1)


def test_bands_fit_the_sample_rate_of_the_data_by_default(write):
    text = (
        ENDS + '[data]\nsample_rate = 8000\n[model]\nname = "bs_roformer"\nn_channels = 1\nn_blocks = 1\nd_model = 8\n'
    )

    at_8_kHz, at_44_khz = (build_model(load_recipe(write(text + more))) for more in ("", "sample_rate = 44_100\n"))

    assert at_8_kHz.split.width_groups == group_equal_widths([2 * len(band) for band in uniform_bands(2048, 8000)])
    assert at_44_khz.split.width_groups != at_8_kHz.split.width_groups


def test_a_threshold_filter_is_at_minus_thirty_db_by_default(write):
    recipe = load_recipe(write(ENDS + '[[filter]]\nname = "threshold"\n'))

    assert build_state(recipe, build_model(recipe), precision="fp32").filters[0].threshold_db == -30.0


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_recipes_load_and_name_parts_that_exist(path):
    recipe = load_recipe(path, ["data.path=speech", *(["data.noise=noise"] if "noise" in path.stem else [])])

    state = build_state(recipe, build_model(recipe), precision="fp32")

    assert state.clipper.max_norm == 5.0
    assert sum(len(group["params"]) for group in state.optimizer.param_groups) == len(list(state.model.parameters()))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_resolved_recipe_reads_back_as_itself(path, write):
    recipe = load_recipe(path, ["data.path=speech", *(["data.noise=noise"] if "noise" in path.stem else [])])

    assert recipe_table(load_recipe(write(to_toml(recipe)))) == recipe_table(recipe)
    assert recipe_from_table(tomllib.loads(to_toml(recipe)), Path()).data == recipe.data


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[optin]\n" + ENDS, ["[optin]", "optim", "Did you mean 'optim'?"]),
        ("[train]\nmax_step = 1\n", ["[train]", "'max_step'", "Did you mean 'max_steps'?"]),
        ("[data]\nbatch_size = 'four'\n" + ENDS, ["data.batch_size", "'four'", "a whole number"]),
        ("[data]\nbatch_size = true\n" + ENDS, ["data.batch_size", "True", "a whole number"]),
        ("[data]\nbatch_size = 0\n" + ENDS, ["data.batch_size = 0", "above 0"]),
        ("[data]\nsilent = 'redaw'\n" + ENDS, ["data.silent", "'redraw'", "'keep'", "Did you mean 'redraw'?"]),
        ("[data]\ngains_db = [0.0, -5.0]\n" + ENDS, ["data.gains_db", "from low to high"]),
        ("[data]\ngains_db = [0.0]\n" + ENDS, ["data.gains_db", "list of 2"]),
        ("[data]\nexclude = 'a.wav'\n" + ENDS, ["data.exclude", "list"]),
        ("[train]\nprecision = 'bf61'\nmax_steps = 1", ["train.precision", "Did you mean 'bf16'?"]),
        ("[train]\nloss_upper_limit = 5.0", ["no end", "max_steps", "max_minutes"]),
        ("[[filter]]\nthreshold_db = -30\n" + ENDS, ["[filter]", "needs a name"]),
        ("model = 'sepformer'\n" + ENDS, ["model = 'sepformer'", "[model]"]),
        ("[filter]\nname = 'threshold'\n" + ENDS, ["[[filter]]", "two brackets"]),
        ("[data\n", ["not valid TOML", "line 1"]),
        ("[data]\nlevel_db = nan\n" + ENDS, ["data.level_db", "finite"]),
        ("[data]\ngains_db = [-inf, 0.0]\n" + ENDS, ["data.gains_db", "finite"]),
        ("[validate]\nsave_audio = -1\n" + ENDS, ["validate.save_audio = -1", "0 or more"]),
        ("[data]\nexcerpt_seconds = 1e-6\n" + ENDS, ["0 samples", "longer"]),
        ("[data]\nexcerpt_seconds = 1e308\n" + ENDS, ["data.excerpt_seconds = 1e+308", "at most 100000"]),
        ("[data]\nbatch_size = 2147483648\n" + ENDS, ["data.batch_size", "at most 1e+06"]),
        ("[data]\nbatch_size = 100000\nexcerpt_seconds = 1e4\n" + ENDS, ["TiB", "data.batch_size"]),
        ("[data]\nitems_per_epoch = 100000000000000000000000\n" + ENDS, ["data.items_per_epoch", "at most 1e+09"]),
        ("[validate]\nn_items = 2147483648\n" + ENDS, ["validate.n_items", "at most 1e+07"]),
        ("[data]\npath = ''\n" + ENDS, ["data.path", "--set data.path=PATH"]),
    ],
)
def test_a_mistake_is_named_in_one_line(write, text, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text))

    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model]\nname = 'conv_tasnot'", ["[model]", "conv_tasnet", "Did you mean 'conv_tasnet'?", "my_file:MyClass"]),
        ("[model]\nname = 'conv_tasnet'\nn_filter = 8", ["[model]", "'n_filter'", "Did you mean 'n_filters'?"]),
        ("[model]\nname = 'conv_tasnet'\nn_filters = 1.5", ["model.n_filters = 1.5", "a whole number"]),
        ("[model]\nname = 're_sepformer'\nn_blocks = 0", ["[model] re_sepformer", "n_blocks = 0", "1 or more"]),
        ("[model]\nname = 'conv_tasnet'\nstride = -2", ["[model] conv_tasnet", "stride = -2", "1 or more"]),
        ("[model]\nname = 'conv_tasnet'\nskip = -1", ["[model] conv_tasnet", "skip = -1", "0 or more"]),
        ("[model]\nname = 'bs_roformer'\nbands = 'mel'\nn_bands = 0", ["n_bands = 0", "1 or more"]),
        ("[model]\nname = 'bs_roformer'\nbands = 'uniform'\nsample_rate = 0", ["sample_rate = 0", "1 or more"]),
        ("[model]\nname = 'sepformer'\ndropout = 1.5", ["[model] sepformer", "dropout = 1.5", "below 1"]),
        ("[optim]\nname = 'adam'\nlr = 'fast'", ["optim.lr", "a number"]),
        ("[optim]\nname = 'adan'", ["[optim]", "Did you mean 'adam'?"]),
        ("[clip]\nname = 'fixed'\nmax_norm = 0", ["max_norm = 0", 'name = "none"']),
        ("[clip]\nname = 'autoclip'\npercentile = 101", ["percentile = 101", "between 0 and 100"]),
        ("[loss]\nname = 'si_sdr'", ["[loss]", "neg_si_sdr", "Did you mean 'neg_si_sdr'?"]),
        ("[loss]\nname = 'l1'\n[[filter]]\nname = 'threshold'", ["threshold", "dB", "l1"]),
        ("[loss]\nname = 'l1'\nassign = 'permuted'", ["loss.assign", "'permutation', 'fixed', 'mixit'"]),
        ("[loss]\nname = 'neg_snr'\nmax_db = 3.0", ["[loss]", "'max_db'"]),
        ("[loss]\nname = 'neg_thresholded_snr'\nmax_db = -3.0", ["[loss] neg_thresholded_snr", "max_db = -3.0"]),
        ("[loss]\nname = 'neg_si_sdr'\ninactive_weight = -1.0", ["inactive_weight = -1.0", "0 or more"]),
        ("[loss]\nname = 'neg_si_sdr'\nassign = 'mixit'", ["mixit", "level", "neg_snr"]),
        ("[loss]\nname = 'sum'", ["[[loss.terms]]"]),
        ("[loss]\nname = 'sum'\nterm = 3", ["'sum'", "term"]),
        ("[loss]\nname = 'sum'\n[[loss.terms]]\nname = 'l2'", ["[loss]", "'l2'", "l1"]),
        ("[loss]\nname = 'sum'\n[[loss.terms]]\nname = 'l1'\nweight = 'half'", ["loss.terms.weight", "a number"]),
        ("[loss]\nname = 'sum'\n[[loss.terms]]\nname = 'l1'\nweight = 0.0", ["weight above 0"]),
        ("[model]\nname = 'nowhere:Net'", ["nowhere:Net", "no nowhere.py"]),
        ("[model]\nname = 'sepformer'\nn_heads = 7", ["[model] sepformer", "n_heads 7"]),
        ("[model]\nname = 'conv_tasnet'\nn_filters = -1", ["n_filters = -1 must be 1 or more"]),
        ("[model]\nname = 'conv_tasnet'\nmask = 'sigmod'", ["model.mask", "Did you mean 'sigmoid'?"]),
        ("[schedule]\nname = 'cosine'\nwarmup_steps = -5", ["warmup_steps = -5", "0 or more"]),
        ("[schedule]\nname = 'plateau'\nreduce_by = -2.0", ["reduce_by = -2", "between 0 and 1"]),
    ],
)
def test_a_mistake_in_a_part_is_named_in_one_line(write, text, words):
    recipe = load_recipe(write(f"{ENDS}{text}\n"))
    with pytest.raises(RecipeError) as caught:
        build_state(recipe, build_model(recipe), precision="fp32")

    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr", ["must look like optim.lr=3e-4"]),
        ("lr=3", ["key of a table"]),
        ("schedule=3", ["key of a table"]),
        ("filter.0.threshold_db=-40", ["0 of [[filter]]"]),
        ("train.max_steps.x=3", ["max_steps is a value"]),
    ],
)
def test_an_override_that_cannot_be_laid_over_is_named(write, override, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(ENDS), [override])
    assert [word for word in words if word not in str(caught.value)] == []


def test_overrides_are_toml_or_plain_text(write):
    filters = '[[filter]]\nname = "threshold"\n'
    overrides = ["optim.name=sgd", "optim.lr=3e-4", "filter.0.threshold_db=-40", "data.gains_db=[-3, 3]"]
    recipe = load_recipe(write(ENDS + filters), overrides)

    assert (recipe.optim.name, recipe.optim.options["lr"]) == ("sgd", 3e-4)
    assert recipe.filters[0].options["threshold_db"] == -40
    assert recipe.data.gains_db == (-3.0, 3.0)


def test_naming_another_part_leaves_the_keys_of_the_one_before_behind(write):
    recipe = load_recipe(
        write(ENDS + '[clip]\nname = "fixed"\nmax_norm = 1.0\n[optim]\nname = "adam"\nlr = 1e-3\n'),
        ["clip.name=autoclip", "clip.percentile=5", "optim.name=sgd", 'schedule={name="cosine"}'],
    )

    assert (recipe.clip.name, recipe.clip.options) == ("autoclip", {"percentile": 5})
    assert (recipe.optim.name, recipe.optim.options) == ("sgd", {"lr": 1e-3})
    assert recipe.schedule.name == "cosine"


def test_paths_in_the_file_are_relative_to_it_and_paths_on_the_command_line_to_the_current_folder(
    write, tmp_path, monkeypatch
):
    path = write(ENDS + '[data]\npath = "speech"\nnoise = "noise"\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    recipe = load_recipe(path, ["data.noise=hum"])

    assert recipe.data.path == tmp_path / "speech"
    assert recipe.data.noise == tmp_path / "elsewhere" / "hum"


def test_a_custom_model_is_one_file_next_to_the_recipe(write, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, *, n_sources: int, width: int = 3):\n"
        "        super().__init__()\n"
        "        self.filters = nn.Conv1d(1, n_sources, width, padding=width // 2)\n"
        "    def forward(self, mixture):\n"
        "        return self.filters(mixture)[:, :, None]\n"
    )
    recipe = load_recipe(write(ENDS + '[data]\nn_sources = 3\n[model]\nname = "mine:Net"\nwidth = 5\n'))

    assert build_model(recipe).filters.weight.shape == (3, 1, 5)
    with pytest.raises(RecipeError, match="--trust"):
        build_model(recipe, trust=False)


def test_the_same_seed_gives_the_same_initial_weights(write):
    recipe = load_recipe(write(ENDS))
    one, two = build_model(recipe).state_dict(), build_model(recipe).state_dict()
    other = build_model(load_recipe(write(ENDS + "[data]\nseed = 1\n"))).state_dict()

    assert all(one[name].equal(two[name]) for name in one)
    assert not one["narrow.weight"].equal(other["narrow.weight"])


def test_differences_name_the_keys():
    before, after = {"optim": {"lr": 1, "name": "a"}, "x": 1}, {"optim": {"lr": 2, "name": "a"}, "y": 1}

    assert differences(before, after) == {"optim.lr": (1, 2), "x": (1, None), "y": (None, 1)}


def test_a_sum_of_losses_is_built_from_its_terms(write):
    text = """
[loss]
name = 'sum'
assign = 'fixed'
[[loss.terms]]
name = 'neg_thresholded_snr'
weight = 2
max_db = 20.0
[[loss.terms]]
name = 'l1'
"""
    recipe = load_recipe(write(f"{ENDS}{text}"))
    loss = build_loss(recipe)
    estimate, target = torch.randn(2, 2, 1, 50), torch.randn(2, 2, 1, 50)

    expected = 2 * neg_thresholded_snr(estimate, target, max_db=20.0) + l1(estimate, target)
    torch.testing.assert_close(loss(estimate, target), expected.mean((1, 2)))
    assert recipe_from_table(recipe_table(recipe), recipe.folder) == recipe


@pytest.mark.parametrize(("value", "expected"), [("false", "off"), ("true", "on"), ("auto", "auto"), ("off", "off")])
def test_true_and_false_stand_for_on_and_off(recipe_file, value, expected):
    assert load_recipe(recipe_file(), [f"train.compile={value}"]).train.compile == expected


def test_a_misspelt_key_is_named_before_an_empty_path(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('[data]\npath = ""\n[train]\nmax_steps = 1\n')

    with pytest.raises(RecipeError, match=r"has no key 'paht'.*Did you mean 'path'"):
        load_recipe(file, ["data.paht=speech"])
    with pytest.raises(RecipeError, match=r"data\.path is empty"):
        load_recipe(file)


def test_a_table_without_a_name_configures_the_default(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text("[optim]\nlr = 0.1\n[train]\nmax_steps = 1\n")

    recipe = load_recipe(file, ["loss.assign=fixed"])

    assert (recipe.optim.name, recipe.optim.options) == ("adam", {"lr": 0.1})
    assert (recipe.loss.name, recipe.assign) == ("neg_si_sdr", "fixed")
