"""The page as a person sees it, in a real browser."""

import json
import shutil

import pytest
from browser import comes_true, foreign, ink, opened
from runs import add_sounds, add_steps, write_run
from served import dashboard

BLUE, ORANGE, RED = "#0b84c6", "#e2711d", "#d6453d"
HOSTILE = "<img src=x onerror=alert(1)>.wav"

pytestmark = pytest.mark.slow


def sick(run):
    for row in run.steps[200:260]:
        row["loss"] += 18
    run.steps[99].update(outcome="nonfinite_loss", loss=None, loss_text="nan", n_trained=0, clipped=False)
    message = f"Step 100 was left out; {HOSTILE} holds NaN."
    run.events.append({"code": "STEP_SKIPPED_NONFINITE_LOSS", "step": 100, "rank": 0, "message": message})
    run.events[-1]["files"] = [f"speaker/{HOSTILE}"]
    run.recipe["optim"]["lr"] = 0.002
    run.recipe["data"] = {"path": f'"><script>alert(2)</script>{HOSTILE}'}


@pytest.fixture
def folder(tmp_path):
    path = write_run(tmp_path / "runs" / "first", n_steps=600, max_steps=5000)
    add_sounds(path, steps=(100, 600), files=("a/one.wav", HOSTILE))
    (path / "evaluation.csv").write_text(f'index,si_sdri,files\n0,-1.5,"x/{HOSTILE} + y.wav"\n')
    write_run(tmp_path / "runs" / "second", n_steps=600, seed=1, change=sick)
    return tmp_path / "runs"


def show(page, served, name):
    page.goto(served.link)
    page.get_by_role("button", name=name, exact=True).click()
    page.wait_for_selector(f"h1:text-is('{name}')")
    page.wait_for_selector("#chart-loss canvas")
    page.wait_for_selector("#health .lead")


def test_a_run_is_drawn_judged_and_heard(folder):
    with dashboard(folder) as served, opened() as page:
        show(page, served, "first")

        assert "600 of 5,000" in page.inner_text("#lead")
        assert BLUE in ink(page, "loss")
        assert BLUE in ink(page, "si_sdri")
        assert BLUE in ink(page, "norm")
        assert page.inner_text("#health .lead").startswith("Healthy")
        assert page.locator("#sound article").count() == 3
        page.locator("#sound audio").first.evaluate("sound => sound.play()")
        comes_true(page, "document.querySelector('#sound audio').duration > 0.9")
        comes_true(page, "document.querySelector('#sound img').naturalWidth === 360")
        page.locator("#sound select").first.select_option("0")
        assert "+3.00 dB" in page.locator("#sound article").first.inner_text()
        page.locator("#blocks summary").click()
        assert page.locator("#blocks tbody tr").count() == 6
        assert "blocks.3" in page.inner_text("#blocks")
        assert page.faults == []
        assert foreign(page, served) == []


def test_steps_appear_as_they_are_made(folder):
    with dashboard(folder) as served, opened() as page:
        show(page, served, "first")

        add_steps(folder / "first", 601, 3)
        comes_true(page, "document.getElementById('lead').innerText.includes('603 of 5,000')")

        comes_true(page, "state.series[state.chosen[0]].steps.at(-1) >= 602")
        with (folder / "first" / "validation.jsonl").open("a") as file:
            file.write(json.dumps({"step": 603, "loss": -9.0, "si_sdr": 9.0, "si_sdri": 9.0, "lr": 1e-3}) + "\n")
        comes_true(page, "document.getElementById('lead').innerText.includes('+9.00 dB')")
        write_run(folder / "third", n_steps=5)
        page.wait_for_selector("#runs :text-is('third')")
        assert page.faults == []


def test_two_runs_lie_over_each_other_and_their_recipes_differences_are_shown(folder):
    with dashboard(folder) as served, opened() as page:
        show(page, served, "first")
        page.keyboard.press("2")

        page.wait_for_selector("tr.differs:has-text('optim.lr')")
        comes_true(page, "state.series[state.chosen[1]] !== undefined")
        assert {BLUE, ORANGE} <= ink(page, "loss")
        row = page.locator("tr.differs:has-text('optim.lr')").inner_text()
        assert ("0.001" in row, "0.002" in row) == (True, True)
        assert not page.locator("tr.differs:has-text('clip.name')").count()
        address = page.url
        page.goto(address)
        page.wait_for_selector("tr.differs:has-text('optim.lr')")
        page.keyboard.press("2")
        comes_true(page, "state.chosen.length === 1")
        assert ORANGE not in ink(page, "loss")


def test_a_finding_leads_to_its_place_in_the_curves(folder):
    with dashboard(folder) as served, opened() as page:
        show(page, served, "second")

        page.locator(".finding", has_text="The loss jumped").get_by_role("button").click()

        page.wait_for_selector("text=/steps 1\\d\\d to 2\\d\\d/")
        first, last = page.evaluate("state.window")
        assert first < 201 < 240 < last
        comes_true(page, "state.series[state.chosen[0]].steps[0] >= state.window[0]")
        page.keyboard.press("z")
        comes_true(page, "state.window === null")


def test_left_out_steps_stand_in_the_strip_with_their_reason(folder):
    with dashboard(folder) as served, opened(viewport={"width": 1400, "height": 1000}) as page:
        show(page, served, "second")
        assert RED in ink(page, "strip")
        page.evaluate("room.zoom([95, 105])")
        comes_true(page, "state.series[state.chosen[0]].steps.length <= 12")
        over = page.locator("#chart-strip .u-over")
        over.scroll_into_view_if_needed()
        box = over.bounding_box()

        page.mouse.move(box["x"] + box["width"] * 0.53, box["y"] + box["height"] / 2)

        page.wait_for_selector("#chart-strip .read:has-text('step 100: left out (loss not finite)')")
        assert page.locator("#chart-loss .read").inner_text().startswith("step 100")


def test_names_are_text_and_never_html(folder):
    with dashboard(folder) as served, opened() as page:
        for name in ("first", "second"):
            show(page, served, name)
            page.wait_for_selector("#recipe table")
        assert HOSTILE in page.inner_text("#incidents")
        assert "<script>alert(2)</script>" in page.inner_text("#recipe")
        assert page.locator("img[src='x']").count() == 0
        assert page.faults == []


def test_empty_and_broken_runs_say_so_in_words(folder):
    (folder / "empty").mkdir()
    (folder / "empty" / "recipe.toml").write_text("[train\n")
    (folder / "empty" / "steps.jsonl").write_text("")
    write_run(folder / "torn", n_steps=50)
    with (folder / "torn" / "steps.jsonl").open("a") as file:
        file.write("\x00\x00{{{\n")
    with dashboard(folder) as served, opened() as page:
        page.goto(served.link)
        page.get_by_role("button", name="empty", exact=True).click()
        page.wait_for_selector("text=It has written no step yet")
        page.wait_for_selector("text=recipe.toml cannot be read")
        page.get_by_role("button", name="torn", exact=True).click()
        page.wait_for_selector("text=1 line of its records could not be read")
        assert BLUE in ink(page, "loss")
        assert page.faults == []


def test_a_run_that_is_gone_and_a_dashboard_that_has_ended_are_told(folder):
    with dashboard(folder) as served, opened() as page:
        show(page, served, "second")
        shutil.move(folder / "second", folder.parent / "elsewhere")
        page.wait_for_selector("h1:has-text('This run is no longer in its folder')")
        port = str(served.port)
    with opened() as page:
        with dashboard(folder, words=["--port", port]) as served:
            show(page, served, "first")
        page.wait_for_selector("#link.lost")
        with dashboard(folder, words=["--port", port]):
            page.wait_for_selector("#link:has-text('this dashboard has ended')")


def test_the_list_is_walked_by_keyboard_while_it_changes(folder):
    with dashboard(folder) as served, opened() as page:
        show(page, served, "first")
        page.get_by_role("button", name="second", exact=True).focus()
        add_steps(folder / "first", 601, 3)
        comes_true(page, "document.getElementById('runs').innerText.includes('603')")

        assert page.evaluate("document.activeElement.innerText") == "second"


def test_a_window_is_moved_by_buttons_and_keys(folder):
    with dashboard(folder) as served, opened() as page:
        show(page, served, "first")
        page.get_by_role("button", name="Closer").click()
        comes_true(page, "state.window !== null && state.window[1] - state.window[0] < 310")
        page.keyboard.press("ArrowLeft")
        comes_true(page, "state.window[0] < 100")
        page.keyboard.press("-")
        page.keyboard.press("-")
        comes_true(page, "state.window === null")


def test_a_ninth_run_is_refused_in_words(folder):
    for n in range(8):
        write_run(folder / f"more-{n}", n_steps=20)
    with dashboard(folder) as served, opened() as page:
        show(page, served, "first")
        for key in "23456789":
            page.keyboard.press(key)
        page.evaluate("lay(state.runs[9].id)")
        page.wait_for_selector("text=No more than 8 runs can lie over each other")
        assert page.evaluate("state.chosen.length") == 8


def test_the_link_opens_from_another_sites_page(folder, tmp_path):
    with dashboard(folder) as served, opened() as page:
        (tmp_path / "mail.html").write_text(f'<a href="{served.link}">the page</a>')
        page.goto((tmp_path / "mail.html").as_uri())
        page.click("a")
        page.wait_for_selector("#chart-loss canvas")


def test_a_folder_without_runs_waits_for_one(tmp_path):
    with dashboard(tmp_path) as served, opened() as page:
        page.goto(served.link)
        page.wait_for_selector("text=There is no run here yet")
        write_run(tmp_path / "one", n_steps=50)
        page.wait_for_selector("h1:text-is('one')")


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_sticks_out_of_a_phone_or_a_screen(folder, width):
    with dashboard(folder) as served, opened(viewport={"width": width, "height": 800}) as page:
        show(page, served, "second")
        page.wait_for_selector("#recipe table")

        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_light_and_dark_by_a_key_and_remembered(folder):
    with dashboard(folder) as served, opened(color_scheme="light") as page:
        show(page, served, "first")
        ground = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(ground)
        page.keyboard.press("t")
        dark = page.evaluate(ground)
        page.reload()
        page.wait_for_selector("#chart-loss canvas")

        assert light != dark
        assert page.evaluate(ground) == dark


def test_a_million_steps_are_thinned_and_exact_where_one_looks_close(tmp_path):
    path = write_run(tmp_path / "long", n_steps=10, max_steps=1_000_000)
    with (path / "steps.jsonl").open("w") as file:
        for step in range(1, 1_000_001):
            loss = 50.0 if step == 654_321 else -step / 1e5
            file.write(
                f'{{"step":{step},"outcome":"trained","loss":{loss},"grad_norm":1.0,"max_norm":5.0,"clipped":false}}\n'
            )
    with dashboard(path) as served, opened() as page:
        show(page, served, "long")
        comes_true(page, "state.series[state.chosen[0]].unread_bytes === 0", seconds=300)

        series = page.evaluate("state.series[state.chosen[0]]")
        assert len(series["steps"]) <= 700
        assert sum(series["n_steps"]) == 1_000_000
        assert max(series["high"]["loss"]) == 50.0

        page.evaluate("room.zoom([654300, 654340])")
        comes_true(page, "state.series[state.chosen[0]].steps.length <= 41")
        near = page.evaluate("state.series[state.chosen[0]]")
        assert near["steps"] == list(range(654_300, 654_341))
        assert near["mean"]["loss"][21] == 50.0
        assert page.faults == []
