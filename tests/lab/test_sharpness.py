"""`unbraid lab sharpness`: Hessian and noise of a real checkpoint, interruption, and refused input."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from small_models import TINY
from torch import nn

from unbraid.cli import main as cli
from unbraid.config.recipe import load_recipe
from unbraid.lab import sharpness
from unbraid.lab.experiment import experiment_from_recipe, mean_loss
from unbraid.lab.gradient_noise import NoiseScale
from unbraid.lab.hessian import (
    DOUBLE_BACKWARD,
    GRADIENT_DIFFERENCES,
    PLAIN_KERNELS,
    ExtremeEigenvalues,
    choose_method,
    extreme_eigenvalues,
    hessian_product,
)
from unbraid.lab.sharpness import Sharpness, describe, measure_sharpness
from unbraid.robust.precision import Precision


@pytest.fixture
def run(recipe_file, tmp_path):
    words = ["train", str(recipe_file()), "--run", str(tmp_path / "run"), "--set", "validate.every_steps=0"]
    assert cli.main(words) == 0
    return tmp_path / "run"


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_command_reports_eigenvalues_limit_and_noise_and_does_not_change_the_run(run, tmp_path, capsys):
    before = contents(run)
    out = tmp_path / "numbers.json"
    capsys.readouterr()

    assert cli.main(["lab", "sharpness", str(run), "--items", "6", "-o", str(out)]) == 0

    assert contents(run) == before
    printed = capsys.readouterr().out
    numbers = json.loads(out.read_text(), parse_constant=pytest.fail)
    hessian = numbers["hessian"]
    assert hessian["converged"] == (hessian["residual"] <= 1e-3)
    assert f"eigenvalue of the Hessian: {hessian['highest']:.4g}" in printed
    assert "noise scale" in printed
    assert numbers["noise_scale"]["n_batches"] == 6
    assert numbers["noise_scale"]["noise"] > 0


def test_results_repeat_and_the_experiment_is_unchanged(recipe_file):
    experiment = experiment_from_recipe(load_recipe(recipe_file()), "tiny")
    before = {name: weight.clone() for name, weight in experiment.weights.items()}
    first, second = (measure_sharpness(experiment, n_items=3, n_products=4).as_json() for _ in range(2))

    assert first == second
    assert all(torch.equal(before[name], weight) for name, weight in experiment.weights.items())


@pytest.mark.parametrize("during", ["hessian_product", "gradient"])
def test_ctrl_c_reports_the_results_so_far_and_exits_with_130(run, monkeypatch, capsys, during):
    original = getattr(sharpness, during)
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(os.kill(os.getpid(), signal.SIGINT))
        return original(*args, **kwargs)

    monkeypatch.setattr(sharpness, during, interrupted)
    capsys.readouterr()

    assert cli.main(["lab", "sharpness", str(run), "--items", "3", "--iterations", "2"]) == 130

    printed = capsys.readouterr().out
    assert len(calls) == 1
    assert "Stopped" in printed
    assert f"after {1 if during == 'hessian_product' else 2} products" in printed
    assert "NOT converged" in printed
    assert "noise scale" not in printed


def test_bad_input_is_one_line_of_error(run, capsys):
    capsys.readouterr()
    for words, message in (["--items", "2"], "give 3 or more"), (["--set", "model.hidden=8"], "another model"):
        assert cli.main(["lab", "sharpness", str(run), "--iterations", "2", *words]) == 2

        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


def a_sharpness(
    *, highest=8.0, residual=1e-5, lowest=-1.0, optimizer="sgd", lr=0.5, method=DOUBLE_BACKWARD, signal_part=5.0
):
    eigenvalues = ExtremeEigenvalues(highest, lowest, residual, 1e-5, torch.zeros(1), 9, 1e-3)
    noise = NoiseScale(100.0, signal_part, 100 / signal_part, 1.0, 1.0, 2.0, 30, 1)
    return Sharpness(eigenvalues, noise, method, 30, lr, optimizer)


def description(**changes):
    return " ".join(describe(a_sharpness(**changes)))


def test_sentences_explain_the_numbers():
    assert "On the quadratic approximation of the loss here" in description()
    assert "above 2/lambda = 0.25;" in description()
    assert "The recipe's sgd has lr = 0.5, above that" in description()
    assert "lr = 0.1, below that" in description(lr=0.1)
    assert "adam, at 0.5, scales each weight's step" in description(optimizer="adam")
    assert "no minimum" in description()
    assert "no minimum" not in description(lowest=0.5)
    assert "0 to within rounding" in description(lowest=-1e-6)
    assert "NOT converged" in description(residual=0.1)
    assert "2/lambda" not in description(residual=0.1)
    assert "gradients were subtracted" in description(method=GRADIENT_DIFFERENCES)
    assert "20 +- 2 examples" in description()
    assert "noise scale: unknown" in description(signal_part=1.5)


def test_rounding_below_zero_is_not_negative_curvature():
    torch.manual_seed(0)
    model = nn.Linear(40, 1, bias=False)
    x = torch.randn(7, 40)
    target = torch.randn(7, 1)
    product = hessian_product(model, [lambda m: (m(x) - target).square().mean()], [1.0], method=DOUBLE_BACKWARD)
    # Least squares of 7 examples: convex, and flat along 33 directions.
    eigenvalues = extreme_eigenvalues(product, torch.randn(40))

    assert abs(eigenvalues.lowest) < 1e-3 * eigenvalues.highest
    for lowest in (eigenvalues.lowest, -4e-7 * eigenvalues.highest, 4e-7 * eigenvalues.highest):
        flat = Sharpness(replace(eigenvalues, lowest=lowest), None, DOUBLE_BACKWARD, 7, None, "sgd")
        text = " ".join(describe(flat))
        assert "0 to within rounding" in text
        assert "no minimum" not in text
    curved = replace(eigenvalues, lowest=-0.01 * eigenvalues.highest)
    assert "no minimum" in " ".join(describe(Sharpness(curved, None, DOUBLE_BACKWARD, 7, None, "sgd")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dprnn", "sepformer"])
def test_hessians_of_recurrence_and_attention_are_symmetric(recipe_file, name):
    file = recipe_file()
    head, tail = file.read_text().split("[model]")
    options = "".join(f"{key} = {value}\n" for key, value in TINY[name].items())
    file.write_text(f'{head}[model]\nname = "{name}"\n{options}[optim]{tail.split("[optim]")[1]}')
    experiment = experiment_from_recipe(load_recipe(file, ["data.excerpt_seconds=0.1"]), name)
    model = experiment.copy_model()
    (batch,) = experiment.fixed_batches(2)

    def loss(model):
        return mean_loss(model, experiment.build_loss(), Precision("fp32"), [batch])

    method = choose_method(model, loss)
    product = hessian_product(model, [loss], [1.0], method=method)
    u, v = torch.randn(2, sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(0))

    # The fast kernel of attention has no second derivative.
    assert method == (PLAIN_KERNELS if name == "sepformer" else DOUBLE_BACKWARD)
    torch.testing.assert_close(v @ product(u), u @ product(v), rtol=1e-3, atol=1e-3)
    result = measure_sharpness(experiment, n_items=3, n_products=10)
    assert (result.method, result.eigenvalues.n_products) == (method, 10) or result.eigenvalues.converged
