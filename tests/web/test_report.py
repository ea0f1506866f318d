"""The report is one small file that shows a run anywhere, with no network."""

import re

import numpy as np
import pytest
import soundfile
from browser import comes_true, foreign, ink, opened
from runs import add_sounds, write_run

from unbraid.cli.main import main
from unbraid.web.report import write_report

HOSTILE = "</script><img src=x onerror=alert(1)>.wav"


def sick(run):
    for row in run.steps[200:260]:
        row["loss"] += 18
    run.events.append(
        {"code": "AUDIO_NONFINITE", "step": 5, "rank": 0, "message": f"{HOSTILE} is bad.", "files": [HOSTILE]}
    )


@pytest.fixture
def run(tmp_path):
    path = write_run(tmp_path / "run", n_steps=600, change=sick)
    add_sounds(path, files=(HOSTILE, "b.wav"))
    return path


@pytest.mark.slow
def test_it_opens_from_a_letter_with_no_network(run, tmp_path):
    report = write_report(run, tmp_path / "sent" / "report.html")
    with opened(offline=True) as page:
        page.goto(report.as_uri())
        page.wait_for_selector("#chart-loss canvas")

        assert "#0b84c6" in ink(page, "loss")
        assert "The loss jumped" in page.inner_text("#health")
        assert HOSTILE in page.inner_text("#incidents")
        assert "clip.max_norm" in page.inner_text("#recipe")
        comes_true(page, "document.querySelector('#sound img').naturalWidth === 360")
        page.locator("#sound audio").first.evaluate("sound => sound.play()")
        comes_true(page, "document.querySelector('#sound audio').duration > 0.9")
        page.locator(".finding", has_text="The loss jumped").get_by_role("button").click()
        comes_true(page, "state.series[state.chosen[0]].steps[0] >= state.window[0] - 2")
        assert page.faults == []
        assert foreign(page) == []


@pytest.mark.slow
def test_it_prints_all_of_it(run, tmp_path):
    report = write_report(run, tmp_path / "report.html")
    with opened() as page:
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
        wide = page.evaluate("[...document.querySelectorAll('canvas')].map((one) => one.getBoundingClientRect().width)")
        assert max(wide) <= 660
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert not page.locator("#blocks details").evaluate("one => one.open")


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_twenty_thousand_steps_and_eight_examples_are_less_than_two_megabytes(tmp_path, rate):
    path = write_run(tmp_path / "run", n_steps=20_000, change=sick)
    add_sounds(path, n_items=8, seconds=4.0)
    rng = np.random.default_rng(0)
    for file in sorted((path / "audio").rglob("*.wav")):  # as hard to make small as speech is
        noise = np.cumsum(rng.standard_normal(4 * rate)) if file.stem.endswith("1") else rng.standard_normal(4 * rate)
        soundfile.write(file, 0.3 * noise / np.abs(noise).max(), rate)

    report = write_report(path, tmp_path / "report.html")

    assert report.stat().st_size < 2_000_000
    assert len(re.findall("data:audio/mpeg", report.read_text())) == 8 * 5


def test_sounds_that_do_not_fit_are_left_out_and_the_report_stays_small(tmp_path):
    path = write_run(tmp_path / "run", n_steps=50)
    add_sounds(path, n_items=8, seconds=60.0)

    report = write_report(path, tmp_path / "report.html")

    assert report.stat().st_size < 2_000_000
    assert 0 < len(re.findall("data:audio/mpeg", report.read_text())) < 8 * 5


def test_nothing_in_it_leads_anywhere(run, tmp_path):
    text = write_report(run, tmp_path / "report.html").read_text()

    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text) == []
    assert text.count("</script>") == len(re.findall(r"<script[ >]", text))
    assert "default-src 'none'" in text


def test_the_command_writes_it_beside_the_run_and_says_where(run, capsys):
    assert main(["report", str(run)]) == 0

    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").is_file()


def test_a_run_with_nothing_in_it_has_a_report_too(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("[data]\n")

    assert write_report(tmp_path / "run", tmp_path / "report.html").stat().st_size > 50_000


@pytest.mark.parametrize("what", ["nowhere", "no_run", "folder"])
def test_a_mistake_is_one_sentence(run, tmp_path, capsys, what):
    (tmp_path / "no_run").mkdir()
    words = [str(run), "-o", str(tmp_path)] if what == "folder" else [str(tmp_path / what)]

    assert main(["report", *words]) == 2

    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(tmp_path if what == "folder" else tmp_path / what) in told


def test_plots_for_a_paper_are_written_by_the_same_command(run, tmp_path, capsys):
    assert main(["report", str(run), "--plots", str(tmp_path / "plots")]) == 0

    told = capsys.readouterr().out.split()
    assert str(tmp_path / "plots" / "loss.png") in told
    assert not (run / "report.html").exists()
    assert all(path.endswith(".png") for path in told)
