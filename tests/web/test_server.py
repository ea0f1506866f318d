"""The dashboard answers requests with its token, on this machine, and only reads."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dashboard_process import dashboard, until
from runs import add_audio, add_steps, write_run

from unbraid.cli.main import main
from unbraid.web.payloads import make_run_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    add_audio(write_run(folder / "one", n_steps=300, max_steps=1000))
    write_run(folder / "two", n_steps=200, seed=1)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with dashboard(folder) as process:
        yield process


def test_runs_curves_findings_and_audio_are_served(server, folder):
    runs = {run["name"]: run for run in server.json("/api/runs")}
    run_id = runs["one"]["id"]

    series = server.json(f"/api/series/{run_id}?n=50")
    details = server.json(f"/api/details/{run_id}")

    assert {"one", "two"} <= set(runs)
    assert len(series["steps"]) <= 50
    assert series["last_step"] == 300
    assert series["validation"]["step"] == [100, 200, 300]
    assert details["recipe"]["optim.lr"] == "0.001"
    assert server.json(f"/api/diagnosis/{run_id}")["verdict"].startswith("healthy")
    recording = details["validation_examples"][0]["mixture"][0]
    status, headers, body = server.request(f"/api/audio/{run_id}?name={recording}")
    assert (status, body) == (200, (folder / "one" / recording).read_bytes())
    status, headers, body = server.request(f"/api/spectrogram/{run_id}?name={recording}")
    assert (status, headers["content-type"], body[8:12]) == (200, "image/webp", b"WEBP")


def test_the_token_of_the_link_is_kept_in_a_cookie(server):
    status, headers, _ = server.request(f"/?token={server.token}", cookie=False)

    assert (status, headers["location"]) == (303, "/")
    assert server.cookie in headers["set-cookie"]
    assert "HttpOnly" in headers["set-cookie"]
    assert "samesite=lax" in headers["set-cookie"].lower()


@pytest.mark.parametrize("path", ["/", "/api/runs", "/api/live", "/static/app.js", "/?token=guessed", "/?token="])
def test_without_the_token_nothing_is_served(server, path):
    status, _, body = server.request(path, cookie=False)

    assert status == 403
    assert b"token" in body
    assert b"one" not in body


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "x@127.0.0.1", ""])
def test_another_host_is_refused_even_with_the_token(server, host):
    assert server.request("/api/runs", Host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9000", "[::1]:9000"])
def test_every_name_of_this_machine_is_allowed_with_any_port(server, host):
    assert server.request("/api/runs", Host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_only_reading_is_allowed(server, method):
    status, headers, _ = server.request("/api/runs", method=method)

    assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/", "/api/runs", "/static/page.css", "/nowhere"])
def test_every_answer_forbids_foreign_scripts(server, path):
    _, headers, _ = server.request(path)

    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/static/../server.py", 404),
        ("/static/%2e%2e%2fserver.py", 404),
        ("/static/page.html", 404),
        ("/api/details/nothere", 404),
        ("/api/series/nothere", 404),
        ("/api/series/{one}?first=x", 400),
        ("/api/series/{one}?first=9&last=1", 400),
        ("/api/series/{one}?n=0", 400),
        ("/api/series/{one}?last=99999999999999999999999", 400),
        ("/api/audio/{one}?name=recipe.toml", 404),
        ("/api/audio/{one}?name=../two/recipe.toml", 404),
        ("/api/audio/{one}?name=%00", 404),
        ("/api/spectrogram/{one}", 404),
    ],
)
def test_bad_requests_are_refused(server, folder, path, status):
    actual_status, _, body = server.request(path.format(one=make_run_id(folder / "one")))

    assert actual_status == status
    assert b"Traceback" not in body


def test_new_steps_and_new_runs_are_streamed(server, folder):
    run_id = make_run_id(folder / "one")
    before = server.json(f"/api/series/{run_id}")["last_step"]
    live = socket.create_connection((server.host, server.port), timeout=30)
    request = f"GET /api/live HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nCookie: {server.cookie}\r\n\r\n"
    live.sendall(request.encode())
    received = b""
    add_steps(folder / "one", before + 1, 1)
    write_run(folder / "three", n_steps=5)

    while not (f'"last_step": {before + 1}'.encode() in received and b'"name": "three"' in received):
        more = live.recv(65536)
        assert more, received
        received += more

    assert b"event: grown" in received
    assert b"event: runs" in received
    live.close()


def test_a_deleted_run_disappears_from_the_list(server, folder):
    path = write_run(folder / "gone", n_steps=5)
    run_id = make_run_id(path)
    until(lambda: any(run["name"] == "gone" for run in server.json("/api/runs")))
    server.json(f"/api/series/{run_id}")
    for file in path.iterdir():
        file.unlink()
    path.rmdir()

    until(lambda: all(run["name"] != "gone" for run in server.json("/api/runs")))
    assert server.request(f"/api/details/{run_id}")[0] == 404


def test_it_listens_on_loopback_only(server):
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", server.port), timeout=5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_while_a_page_is_open(folder, number):
    with dashboard(folder) as server, socket.create_connection((server.host, server.port), timeout=30) as live:
        headers = f"Host: 127.0.0.1:{server.port}\r\nCookie: {server.cookie}"
        live.sendall(f"GET /api/live HTTP/1.1\r\n{headers}\r\n\r\n".encode())
        assert live.recv(100)

        server.process.send_signal(number)
        _, errors = server.process.communicate(timeout=30)

    assert "Traceback" not in errors
    assert server.process.returncode == {signal.SIGINT: 0, signal.SIGTERM: -signal.SIGTERM}[number]


INTERRUPTED_IN_A_CALLBACK = """
import os, signal, sys, weakref
from pathlib import Path
from unbraid.web import run_store, server

class Collected: ...

def interrupt(_): os.kill(os.getpid(), signal.SIGINT)

def update_list(self):
    collected = Collected()
    reference = weakref.ref(collected, interrupt)
    del collected  # Python calls interrupt() here, and ignores what is raised in it

run_store.RunStore.update_list = update_list
server.serve([Path(sys.argv[1])], port=0)
"""


def test_a_ctrl_c_during_garbage_collection_stops_it(folder):
    words = [sys.executable, "-c", INTERRUPTED_IN_A_CALLBACK, str(folder)]

    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)

    assert (ended.returncode, ended.stderr) == (0, "")


def test_mistakes_are_explained(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])

        assert main(["dashboard", str(tmp_path), "--port", port]) == 2
    assert f"Cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    assert main(["dashboard", str(tmp_path / "nowhere")]) == 2
    assert "There is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["dashboard", "--port", "70000"])
    assert "from 0 (any free port) to 65535" in capsys.readouterr().err
    assert main(["dashboard", str(tmp_path), "--open-to", "no.such.host.invalid"]) == 2
    assert "no.such.host.invalid" in capsys.readouterr().err


def test_server_and_report_do_not_import_torch():
    code = "import sys; import unbraid.web.server, unbraid.web.report; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Records as a damaged disk or another program may leave them.
ODD_ROWS = (
    {"step": None},
    {"step": True},
    {"step": 2**70},
    {
        "step": 41,
        "outcome": "trained",
        "si_sdr": 3.0,
        "loss": "high",
        "seconds": "5",
        "elapsed_seconds": "9",
        "lr": "x",
    },
    {"step": 42, "outcome": 7, "blocks": [1], "items": 5},
    {"step": 43, "outcome": "trained", "loss": 10**400, "blocks": {"a": 1, "b": {"update_ratio": "x"}}},
    [],
)
ODD_LINES = (
    '{"step": 44, "outcome": "trained", "loss": 1e999, "lr": NaN, "elapsed_seconds": Infinity}',
    "[" * 9000,
    "\x00\xff",
)


def test_damaged_records_break_neither_their_own_run_nor_others(tmp_path):
    odd = write_run(tmp_path / "odd", n_steps=40)
    good = write_run(tmp_path / "good", n_steps=40)
    lines = [*map(json.dumps, ODD_ROWS), *ODD_LINES]
    for name in ("steps", "validation", "events"):
        with (odd / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    with (odd / "events.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "code": None, "message": 5, "files": "one.wav"}) + "\n")
    with (odd / "validation.jsonl").open("a") as file:
        file.write('{"step": 50, "loss": NaN, "si_sdri": Infinity, "best": "yes"}\n')
    recipe = (odd / "recipe.toml").read_text().replace("max_steps = 40", 'max_steps = "many"\nmax_minutes = inf')
    (odd / "recipe.toml").write_text(recipe)
    add_audio(odd)
    (odd / "audio" / "step-000100 copy").mkdir()
    (odd / "audio" / "step-000100 copy" / "scores.json").write_text("{}")
    (odd / "evaluation.csv").write_text("index,si_sdri\nx,nan\n0,inf\n")
    with dashboard(tmp_path) as server:
        for run in server.json("/api/runs"):
            for kind in ("series", "details", "diagnosis"):
                assert server.request(f"/api/{kind}/{run['id']}")[0] == 200, (run["name"], kind)
        add_steps(good, 41, 3)
        add_steps(odd, 60, 3)
        for path, last in ((good, 43), (odd, 62)):
            until(lambda path=path, last=last: server.json(f"/api/series/{make_run_id(path)}")["last_step"] == last)

    assert main(["report", str(odd)]) == 0


def test_an_unreadable_run_is_listed_with_its_problem(tmp_path):
    write_run(tmp_path / "good", n_steps=5)
    (tmp_path / "odd" / "steps.jsonl").mkdir(parents=True)
    with dashboard(tmp_path) as server:
        runs = {run["name"]: run for run in server.json("/api/runs")}
        assert runs["odd"]["problem"]
        assert runs["good"]["step"] == 5


def test_runs_of_the_same_name_are_listed_with_their_folder(tmp_path):
    for folder in ("a", "b"):
        write_run(tmp_path / folder / "run", n_steps=3)
    with dashboard(tmp_path) as server:
        assert {run["name"] for run in server.json("/api/runs")} == {"a/run", "b/run"}


def test_an_incomplete_last_line_is_not_read_again_and_again(tmp_path):
    path = write_run(tmp_path / "killed", n_steps=20)
    with (path / "steps.jsonl").open("ab") as file:
        file.write(b'{"step": 21' + bytes(3 * 2**20))
    with dashboard(path) as server:
        run_id = make_run_id(path)
        assert server.json(f"/api/series/{run_id}")["unread_bytes"] == 0
        until(lambda: server.json(f"/api/series/{run_id}")["last_step"] == 20)
        reads = Path(f"/proc/{server.process.pid}/io")
        if reads.exists():
            before = reads.read_text().split()[1]
            time.sleep(1.5)
            n_bytes = int(reads.read_text().split()[1]) - int(before)
            assert n_bytes < 2**20  # the line has three times as many
