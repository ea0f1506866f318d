"""The report is one small file that shows a run without a network."""

import re

import numpy as np
import pytest
import soundfile
from browser import colours_in_chart, foreign_requests, open_page, wait_until_true
from runs import add_audio, write_run

from unbraid.cli.main import main
from unbraid.web.report import bundle_modules, write_report
from unbraid.web.server import STATIC

HOSTILE = "</script><img src=x onerror=alert(1)>.wav"


def add_faults(run):
    for row in run.steps[200:260]:
        row["loss"] += 18
    run.events.append(
        {"code": "AUDIO_NONFINITE", "step": 5, "rank": 0, "message": f"{HOSTILE} is bad.", "files": [HOSTILE]}
    )


@pytest.fixture
def run(tmp_path):
    path = write_run(tmp_path / "run", n_steps=600, change=add_faults)
    add_audio(path, files=(HOSTILE, "b.wav"))
    return path


@pytest.mark.slow
def test_it_opens_from_a_file_without_a_network(run, tmp_path):
    report = write_report(run, tmp_path / "sent" / "report.html")
    with open_page(offline=True) as page:
        page.goto(report.as_uri())
        page.wait_for_selector("#chart-loss canvas")

        assert "#0b84c6" in colours_in_chart(page, "loss")
        assert "The loss jumped" in page.inner_text("#health")
        assert HOSTILE in page.inner_text("#incidents")
        assert "clip.max_norm" in page.inner_text("#recipe")
        wait_until_true(page, "document.querySelector('#sound img').naturalWidth === 360")
        page.locator("#sound audio").first.evaluate("audio => audio.play()")
        wait_until_true(page, "document.querySelector('#sound audio').duration > 0.9")
        page.locator(".finding", has_text="The loss jumped").get_by_role("button").click()
        wait_until_true(page, "unbraid.state.series[unbraid.state.selected[0]].steps[0] >= unbraid.state.window[0] - 2")
        assert page.errors == []
        assert foreign_requests(page) == []


@pytest.mark.slow
def test_it_prints_completely(run, tmp_path):
    report = write_report(run, tmp_path / "report.html")
    with open_page() as page:
        page.goto(report.as_uri())
        page.wait_for_selector("#chart-loss canvas")
        page.locator("#theme").click()
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")

        assert not page.locator("header").is_visible()
        assert not page.locator("#sound audio").first.is_visible()
        assert page.locator("#sound", has_text="+4.00 dB").is_visible()
        assert page.locator("#blocks tbody tr").first.is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        widths = page.evaluate("[...document.querySelectorAll('canvas')].map((c) => c.getBoundingClientRect().width)")
        assert max(widths) <= 660
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert not page.locator("#blocks details").evaluate("details => details.open")


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_twenty_thousand_steps_and_eight_examples_fit_into_two_megabytes(tmp_path, rate):
    path = write_run(tmp_path / "run", n_steps=20_000, change=add_faults)
    add_audio(path, n_items=8, seconds=4.0)
    rng = np.random.default_rng(0)
    for file in sorted((path / "audio").rglob("*.wav")):  # as hard to compress as speech
        noise = np.cumsum(rng.standard_normal(4 * rate)) if file.stem.endswith("1") else rng.standard_normal(4 * rate)
        soundfile.write(file, 0.3 * noise / np.abs(noise).max(), rate)

    report = write_report(path, tmp_path / "report.html")

    assert report.stat().st_size < 2_000_000
    assert len(re.findall("data:audio/mpeg", report.read_text())) == 8 * 5


def test_long_audio_is_not_included_and_the_report_stays_small(tmp_path):
    path = write_run(tmp_path / "run", n_steps=50)
    add_audio(path, n_items=8, seconds=60.0)

    report = write_report(path, tmp_path / "report.html")

    assert report.stat().st_size < 2_000_000
    assert 0 < len(re.findall("data:audio/mpeg", report.read_text())) < 8 * 5


def test_it_refers_to_nothing_outside(run, tmp_path):
    text = write_report(run, tmp_path / "report.html").read_text()

    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text) == []
    assert text.count("</script>") == len(re.findall(r"<script[ >]", text))
    assert "default-src 'none'" in text


def test_modules_are_joined_in_the_order_of_their_imports():
    bundle = bundle_modules("app.js")
    modules = [path.name for path in STATIC.glob("*.js") if not path.name.startswith("uPlot")]

    names = re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", bundle, re.MULTILINE)
    assert len(names) == len(set(names))  # the modules share one scope there
    assert not re.search(r"^(import|export)\b", bundle, re.MULTILINE)
    for module in modules:
        first_comment = (STATIC / module).read_text().splitlines()[0]
        assert bundle.count(first_comment) == 1
    assert bundle.index("function element(") < bundle.index("class Chart") < bundle.index("async function start(")


def test_the_command_writes_it_into_the_run_directory_and_prints_its_path(run, capsys):
    assert main(["report", str(run)]) == 0

    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").is_file()


def test_an_empty_run_has_a_report_too(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("[data]\n")

    assert write_report(tmp_path / "run", tmp_path / "report.html").stat().st_size > 50_000


@pytest.mark.parametrize("mistake", ["missing", "not_a_run", "out_is_a_folder"])
def test_mistakes_are_explained_in_one_line(run, tmp_path, capsys, mistake):
    (tmp_path / "not_a_run").mkdir()
    bad_path = tmp_path if mistake == "out_is_a_folder" else tmp_path / mistake
    arguments = [str(run), "-o", str(bad_path)] if mistake == "out_is_a_folder" else [str(bad_path)]

    assert main(["report", *arguments]) == 2

    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(bad_path) in message


def test_plots_for_a_paper_are_written_by_the_same_command(run, tmp_path, capsys):
    assert main(["report", str(run), "--plots", str(tmp_path / "plots")]) == 0

    written = capsys.readouterr().out.split()
    assert str(tmp_path / "plots" / "loss.png") in written
    assert not (run / "report.html").exists()
    assert all(path.endswith(".png") for path in written)
