"""The page in a real browser."""

import json
import shutil

import pytest
from browser import colours_in_chart, foreign_requests, open_page, wait_until_true
from dashboard_process import dashboard
from runs import add_audio, add_steps, write_run

# As in labels.js: the first two runs, and steps whose loss is not finite.
BLUE = "#0b84c6"
ORANGE = "#e2711d"
RED = "#d6453d"
HOSTILE = "<img src=x onerror=alert(1)>.wav"

pytestmark = pytest.mark.slow


def add_faults(run):
    for row in run.steps[200:260]:
        row["loss"] += 18
    run.steps[99].update(outcome="nonfinite_loss", loss=None, loss_text="nan", n_trained=0, clipped=False)
    message = f"Step 100 was skipped; {HOSTILE} holds NaN."
    run.events.append({"code": "STEP_SKIPPED_NONFINITE_LOSS", "step": 100, "rank": 0, "message": message})
    run.events[-1]["files"] = [f"speaker/{HOSTILE}"]
    run.recipe["optim"]["lr"] = 0.002
    run.recipe["data"] = {"path": f'"><script>alert(2)</script>{HOSTILE}'}


@pytest.fixture
def folder(tmp_path):
    path = write_run(tmp_path / "runs" / "first", n_steps=600, max_steps=5000)
    add_audio(path, steps=(100, 600), files=("a/one.wav", HOSTILE))
    (path / "evaluation.csv").write_text(f'index,si_sdri,files\n0,-1.5,"x/{HOSTILE} + y.wav"\n')
    write_run(tmp_path / "runs" / "second", n_steps=600, seed=1, change=add_faults)
    return tmp_path / "runs"


def show(page, server, name):
    page.goto(server.link)
    page.get_by_role("button", name=name, exact=True).click()
    page.wait_for_selector(f"h1:text-is('{name}')")
    page.wait_for_selector("#chart-loss canvas")
    page.wait_for_selector("#health .lead")


def test_a_run_is_drawn_diagnosed_and_played(folder):
    with dashboard(folder) as server, open_page() as page:
        show(page, server, "first")

        assert "600 of 5,000" in page.inner_text("#summary")
        assert BLUE in colours_in_chart(page, "loss")
        assert BLUE in colours_in_chart(page, "si_sdri")
        assert BLUE in colours_in_chart(page, "norm")
        assert page.inner_text("#health .lead").startswith("Healthy")
        assert page.locator("#sound article").count() == 3
        page.locator("#sound audio").first.evaluate("audio => audio.play()")
        wait_until_true(page, "document.querySelector('#sound audio').duration > 0.9")
        wait_until_true(page, "document.querySelector('#sound img').naturalWidth === 360")
        page.locator("#sound select").first.select_option("0")
        assert "+3.00 dB" in page.locator("#sound article").first.inner_text()
        page.locator("#blocks summary").click()
        assert page.locator("#blocks tbody tr").count() == 6
        assert "blocks.3" in page.inner_text("#blocks")
        assert page.errors == []
        assert foreign_requests(page, server) == []


def test_new_steps_validations_and_runs_appear(folder):
    with dashboard(folder) as server, open_page() as page:
        show(page, server, "first")

        add_steps(folder / "first", 601, 3)
        wait_until_true(page, "document.getElementById('summary').innerText.includes('603 of 5,000')")

        wait_until_true(page, "unbraid.state.series[unbraid.state.selected[0]].steps.at(-1) >= 602")
        with (folder / "first" / "validation.jsonl").open("a") as file:
            file.write(json.dumps({"step": 603, "loss": -9.0, "si_sdr": 9.0, "si_sdri": 9.0, "lr": 1e-3}) + "\n")
        wait_until_true(page, "document.getElementById('summary').innerText.includes('+9.00 dB')")
        write_run(folder / "third", n_steps=5)
        page.wait_for_selector("#runs :text-is('third')")
        assert page.errors == []


def test_two_runs_share_the_charts_and_their_recipes_are_compared(folder):
    with dashboard(folder) as server, open_page() as page:
        show(page, server, "first")
        page.keyboard.press("2")

        page.wait_for_selector("tr.differs:has-text('optim.lr')")
        wait_until_true(page, "unbraid.state.series[unbraid.state.selected[1]] !== undefined")
        assert {BLUE, ORANGE} <= colours_in_chart(page, "loss")
        row = page.locator("tr.differs:has-text('optim.lr')").inner_text()
        assert ("0.001" in row, "0.002" in row) == (True, True)
        assert not page.locator("tr.differs:has-text('clip.name')").count()
        page.goto(page.url)
        page.wait_for_selector("tr.differs:has-text('optim.lr')")
        page.keyboard.press("2")
        wait_until_true(page, "unbraid.state.selected.length === 1")
        assert ORANGE not in colours_in_chart(page, "loss")


def test_a_finding_zooms_the_charts_to_its_steps(folder):
    with dashboard(folder) as server, open_page() as page:
        show(page, server, "second")

        page.locator(".finding", has_text="The loss jumped").get_by_role("button").click()

        page.wait_for_selector("text=/steps 1\\d\\d to 2\\d\\d/")
        first, last = page.evaluate("unbraid.state.window")
        assert first < 201 < 240 < last
        wait_until_true(page, "unbraid.state.series[unbraid.state.selected[0]].steps[0] >= unbraid.state.window[0]")
        page.keyboard.press("z")
        wait_until_true(page, "unbraid.state.window === null")


def test_skipped_steps_are_in_the_strip_with_their_reason(folder):
    with dashboard(folder) as server, open_page(viewport={"width": 1400, "height": 1000}) as page:
        show(page, server, "second")
        assert RED in colours_in_chart(page, "strip")
        page.evaluate("unbraid.zoom([95, 105])")
        wait_until_true(page, "unbraid.state.series[unbraid.state.selected[0]].steps.length <= 12")
        over = page.locator("#chart-strip .u-over")
        over.scroll_into_view_if_needed()
        box = over.bounding_box()

        # Step 100 is drawn from 100 to 101 in a window from 95 to 105.
        page.mouse.move(box["x"] + box["width"] * 0.53, box["y"] + box["height"] / 2)

        page.wait_for_selector("#chart-strip .readout:has-text('step 100: skipped (loss not finite)')")
        assert page.locator("#chart-loss .readout").inner_text().startswith("step 100")
        assert "max_norm 5" in page.locator("#chart-norm .readout").inner_text()  # shown by its cursor, which is shared


def test_names_are_text_and_never_html(folder):
    with dashboard(folder) as server, open_page() as page:
        for name in ("first", "second"):
            show(page, server, name)
            page.wait_for_selector("#recipe table")
        assert HOSTILE in page.inner_text("#incidents")
        assert "<script>alert(2)</script>" in page.inner_text("#recipe")
        assert page.locator("img[src='x']").count() == 0
        assert page.errors == []


def test_empty_and_broken_runs_are_explained(folder):
    (folder / "empty").mkdir()
    (folder / "empty" / "recipe.toml").write_text("[train\n")
    (folder / "empty" / "steps.jsonl").write_text("")
    write_run(folder / "torn", n_steps=50)
    with (folder / "torn" / "steps.jsonl").open("a") as file:
        file.write("\x00\x00{{{\n")
    with dashboard(folder) as server, open_page() as page:
        page.goto(server.link)
        page.get_by_role("button", name="empty", exact=True).click()
        page.wait_for_selector("text=No step has been written yet")
        page.wait_for_selector("text=recipe.toml cannot be read")
        page.get_by_role("button", name="torn", exact=True).click()
        page.wait_for_selector("text=1 line of its records could not be read")
        assert BLUE in colours_in_chart(page, "loss")
        assert page.errors == []


def test_a_vanished_run_and_a_stopped_dashboard_are_reported(folder):
    with dashboard(folder) as server, open_page() as page:
        show(page, server, "second")
        shutil.move(folder / "second", folder.parent / "elsewhere")
        page.wait_for_selector("h1:has-text('This run is no longer in its folder')")
        port = str(server.port)
    with open_page() as page:
        with dashboard(folder, options=["--port", port]) as server:
            show(page, server, "first")
        page.wait_for_selector("#connection.lost")
        with dashboard(folder, options=["--port", port]):
            page.wait_for_selector("#connection:has-text('this dashboard has ended')")


def test_the_keyboard_focus_survives_changes_of_the_list(folder):
    with dashboard(folder) as server, open_page() as page:
        show(page, server, "first")
        page.get_by_role("button", name="second", exact=True).focus()
        add_steps(folder / "first", 601, 3)
        wait_until_true(page, "document.getElementById('runs').innerText.includes('603')")

        assert page.evaluate("document.activeElement.innerText") == "second"


def test_buttons_and_keys_move_the_window(folder):
    with dashboard(folder) as server, open_page() as page:
        show(page, server, "first")
        page.get_by_role("button", name="Zoom in").click()
        wait_until_true(
            page, "unbraid.state.window !== null && unbraid.state.window[1] - unbraid.state.window[0] < 310"
        )
        page.keyboard.press("ArrowLeft")
        wait_until_true(page, "unbraid.state.window[0] < 100")
        page.keyboard.press("-")
        page.keyboard.press("-")
        wait_until_true(page, "unbraid.state.window === null")


def test_a_ninth_run_is_refused(folder):
    for n in range(8):
        write_run(folder / f"more-{n}", n_steps=20)
    with dashboard(folder) as server, open_page() as page:
        show(page, server, "first")
        for key in "23456789":
            page.keyboard.press(key)
        page.evaluate("unbraid.toggleRun(unbraid.state.runs[9].id)")
        page.wait_for_selector("text=At most 8 runs can be shown together")
        assert page.evaluate("unbraid.state.selected.length") == 8


def test_the_link_works_from_another_sites_page(folder, tmp_path):
    with dashboard(folder) as server, open_page() as page:
        (tmp_path / "mail.html").write_text(f'<a href="{server.link}">the page</a>')
        page.goto((tmp_path / "mail.html").as_uri())
        page.click("a")
        page.wait_for_selector("#chart-loss canvas")


def test_a_run_appears_in_an_empty_folder(tmp_path):
    with dashboard(tmp_path) as server, open_page() as page:
        page.goto(server.link)
        page.wait_for_selector("text=There is no run here yet")
        write_run(tmp_path / "one", n_steps=50)
        page.wait_for_selector("h1:text-is('one')")


@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_fits_a_phone_and_a_desktop(folder, width):
    with dashboard(folder) as server, open_page(viewport={"width": width, "height": 800}) as page:
        show(page, server, "second")
        page.wait_for_selector("#recipe table")

        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_theme_is_switched_by_a_key_and_remembered(folder):
    with dashboard(folder) as server, open_page(color_scheme="light") as page:
        show(page, server, "first")
        background = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(background)
        page.keyboard.press("t")
        dark = page.evaluate(background)
        page.reload()
        page.wait_for_selector("#chart-loss canvas")

        assert light != dark
        assert page.evaluate(background) == dark


def test_a_million_steps_are_downsampled_and_exact_when_zoomed_in(tmp_path):
    path = write_run(tmp_path / "long", n_steps=10, max_steps=1_000_000)
    with (path / "steps.jsonl").open("w") as file:
        for step in range(1, 1_000_001):
            loss = 50.0 if step == 654_321 else -step / 1e5
            file.write(
                f'{{"step":{step},"outcome":"trained","loss":{loss},"grad_norm":1.0,"max_norm":5.0,"clipped":false}}\n'
            )
    with dashboard(path) as server, open_page() as page:
        show(page, server, "long")
        wait_until_true(page, "unbraid.state.series[unbraid.state.selected[0]].unread_bytes === 0", seconds=300)

        series = page.evaluate("unbraid.state.series[unbraid.state.selected[0]]")
        assert len(series["steps"]) <= 700
        assert sum(series["n_steps"]) == 1_000_000
        assert max(series["high"]["loss"]) == 50.0

        page.evaluate("unbraid.zoom([654300, 654340])")
        wait_until_true(page, "unbraid.state.series[unbraid.state.selected[0]].steps.length <= 41")
        zoomed = page.evaluate("unbraid.state.series[unbraid.state.selected[0]]")
        assert zoomed["steps"] == list(range(654_300, 654_341))
        assert zoomed["mean"]["loss"][21] == 50.0
        assert page.errors == []
