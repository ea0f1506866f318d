"""`unbraid lab sharpness`: a real checkpoint's Hessian and noise, stopping, and what is refused."""

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
from unbraid.lab.experiment import mean_loss, of_recipe
from unbraid.lab.gradient_noise import NoiseScale
from unbraid.lab.hessian import WAYS, Extremes, best_way, extremes, hessian_product
from unbraid.lab.sharpness import Sharpness, sharpness_of, tell
from unbraid.robust.precision import Precision


@pytest.fixture
def run(recipe_file, tmp_path):
    words = ["train", str(recipe_file()), "--run", str(tmp_path / "run"), "--set", "validate.every_steps=0"]
    assert cli.main(words) == 0
    return tmp_path / "run"


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_command_tells_eigenvalues_limit_and_noise_and_leaves_the_run(run, tmp_path, capsys):
    before, out = contents(run), tmp_path / "numbers.json"
    capsys.readouterr()

    assert cli.main(["lab", "sharpness", str(run), "--items", "6", "-o", str(out)]) == 0

    assert contents(run) == before
    told, numbers = capsys.readouterr().out, json.loads(out.read_text(), parse_constant=pytest.fail)
    hessian = numbers["hessian"]
    assert hessian["converged"] == (hessian["residual"] <= 1e-3)
    assert f"eigenvalue of the Hessian: {hessian['highest']:.4g}" in told
    assert "noise scale" in told
    assert numbers["noise_scale"]["n_batches"] == 6
    assert numbers["noise_scale"]["noise"] > 0


def test_it_is_the_same_again_and_the_subject_stays(recipe_file):
    subject = of_recipe(load_recipe(recipe_file()), "tiny")
    before = {name: weight.clone() for name, weight in subject.weights.items()}
    one, again = (sharpness_of(subject, n_items=3, n_products=4).as_json() for _ in range(2))

    assert one == again
    assert all(torch.equal(before[name], weight) for name, weight in subject.weights.items())


@pytest.mark.parametrize("during", ["hessian_product", "gradient"])
def test_ctrl_c_tells_what_there_was_and_ends_with_130(run, monkeypatch, capsys, during):
    original, asked = getattr(sharpness, during), []

    def struck(*given, **named):
        asked.append(os.kill(os.getpid(), signal.SIGINT))
        return original(*given, **named)

    monkeypatch.setattr(sharpness, during, struck)
    capsys.readouterr()

    assert cli.main(["lab", "sharpness", str(run), "--items", "3", "--iterations", "2"]) == 130

    told = capsys.readouterr().out
    assert len(asked) == 1
    assert "Stopped" in told
    assert f"after {1 if during == 'hessian_product' else 2} products" in told
    assert "NOT converged" in told
    assert "noise scale" not in told


def test_bad_words_end_in_one_sentence(run, capsys):
    capsys.readouterr()
    for words, told in (["--items", "2"], "give 3 or more"), (["--set", "model.hidden=8"], "another model"):
        assert cli.main(["lab", "sharpness", str(run), "--iterations", "2", *words]) == 2

        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert told in said


def found(*, highest=8.0, residual=1e-5, lowest=-1.0, optimizer="sgd", lr=0.5, way=WAYS[0], signal_part=5.0):
    ends = Extremes(highest, lowest, residual, 1e-5, torch.zeros(1), 9, 1e-3)
    noise = NoiseScale(100.0, signal_part, 100 / signal_part, 1.0, 1.0, 2.0, 30, 1)
    return Sharpness(ends, noise, way, 30, lr, optimizer)


def said(**given):
    return " ".join(tell(found(**given)))


def test_the_sentences_say_what_the_numbers_mean():
    assert "On the quadratic that touches the loss here" in said()
    assert "above 2/lambda = 0.25;" in said()
    assert "The recipe's sgd has lr = 0.5, above that" in said()
    assert "lr = 0.1, below that" in said(lr=0.1)
    assert "adam, at 0.5, scales each weight's step" in said(optimizer="adam")
    assert "no minimum" in said()
    assert "no minimum" not in said(lowest=0.5)
    assert "0 to within rounding" in said(lowest=-1e-6)
    assert "NOT converged" in said(residual=0.1)
    assert "2/lambda" not in said(residual=0.1)
    assert "gradients were subtracted" in said(way=WAYS[2])
    assert "20 +- 2 examples" in said()
    assert "cannot be told" in said(signal_part=1.5)


def test_rounding_below_zero_is_no_bend_downwards():
    torch.manual_seed(0)
    model, given, target = nn.Linear(40, 1, bias=False), torch.randn(7, 40), torch.randn(7, 1)
    product = hessian_product(model, [lambda m: (m(given) - target).square().mean()], [1.0], way=WAYS[0])
    ends = extremes(product, torch.randn(40))  # least squares of 7 examples: convex, and flat along 33 directions

    assert abs(ends.lowest) < 1e-3 * ends.highest
    for lowest in (ends.lowest, -4e-7 * ends.highest, 4e-7 * ends.highest):
        told = " ".join(tell(Sharpness(replace(ends, lowest=lowest), None, WAYS[0], 7, None, "sgd")))
        assert "0 to within rounding" in told
        assert "no minimum" not in told
    bent = replace(ends, lowest=-0.01 * ends.highest)
    assert "no minimum" in " ".join(tell(Sharpness(bent, None, WAYS[0], 7, None, "sgd")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dprnn", "sepformer"])
def test_recurrence_and_attention_have_hessians_that_are_symmetric(recipe_file, name):
    file = recipe_file()
    head, tail = file.read_text().split("[model]")
    options = "".join(f"{key} = {value}\n" for key, value in TINY[name].items())
    file.write_text(f'{head}[model]\nname = "{name}"\n{options}[optim]{tail.split("[optim]")[1]}')
    subject = of_recipe(load_recipe(file, ["data.excerpt_seconds=0.1"]), name)
    model, (batch,) = subject.model(), subject.fixed(2)

    def loss(some):
        return mean_loss(some, subject.loss(), Precision("fp32"), [batch])

    way = best_way(model, loss)
    product = hessian_product(model, [loss], [1.0], way=way)
    one, other = torch.randn(2, sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(0))

    assert way == WAYS[name == "sepformer"]  # attention's fast kernel has no second derivative
    torch.testing.assert_close(other @ product(one), one @ product(other), rtol=1e-3, atol=1e-3)
    found = sharpness_of(subject, n_items=3, n_products=10)
    assert (found.way, found.extremes.n_products) == (way, 10) or found.extremes.converged
