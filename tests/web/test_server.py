"""The dashboard answers the holder of its link, on this machine, and reads only."""

import signal
import socket
import subprocess
import sys

import pytest
from runs import add_sounds, add_steps, write_run
from served import dashboard, until

from unbraid.cli import main
from unbraid.web.facts import run_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    add_sounds(write_run(folder / "one", n_steps=300, max_steps=1000))
    write_run(folder / "two", n_steps=200, seed=1)
    return folder


@pytest.fixture(scope="module")
def served(folder):
    with dashboard(folder) as found:
        yield found


def test_runs_curves_findings_and_sound_are_served(served, folder):
    runs = {run["name"]: run for run in served.json("/api/runs")}
    name = runs["one"]["id"]

    series = served.json(f"/api/series/{name}?n=50")
    details = served.json(f"/api/run/{name}")

    assert set(runs) == {"one", "two"}
    assert len(series["steps"]) <= 50
    assert series["last_step"] == 300
    assert series["scores"]["step"] == [100, 200, 300]
    assert details["recipe"]["optim.lr"] == "0.001"
    assert served.json(f"/api/judged/{name}")["verdict"].startswith("healthy")
    sound = details["examples"]["items"][0]["mixture"][0]
    status, headers, body = served.ask(f"/api/sound/{name}?name={sound}")
    assert (status, body) == (200, (folder / "one" / sound).read_bytes())
    status, headers, body = served.ask(f"/api/picture/{name}?name={sound}")
    assert (status, headers["content-type"], body[8:12]) == (200, "image/webp", b"WEBP")


def test_the_links_token_opens_and_is_kept_in_a_cookie(served):
    status, headers, _ = served.ask(f"/?token={served.token}", cookie=False)

    assert (status, headers["location"]) == (303, "/")
    assert served.cookie in headers["set-cookie"]
    assert "HttpOnly" in headers["set-cookie"]
    assert "samesite=strict" in headers["set-cookie"].lower()


@pytest.mark.parametrize("path", ["/", "/api/runs", "/api/live", "/static/page.js", "/?token=guessed", "/?token="])
def test_without_it_nothing_is_told(served, path):
    status, _, body = served.ask(path, cookie=False)

    assert status == 403
    assert b"token" in body
    assert b"one" not in body


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example", ""]
)
def test_another_host_is_refused_even_with_the_token(served, host):
    assert served.ask("/api/runs", Host=host)[0] == 403


def test_localhost_is_this_machine_too(served):
    assert served.ask("/api/runs", Host=f"localhost:{served.port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_can_only_be_read(served, method):
    status, headers, _ = served.ask("/api/runs", method=method)

    assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/", "/api/runs", "/static/page.css", "/nowhere"])
def test_every_answer_forbids_foreign_scripts(served, path):
    _, headers, _ = served.ask(path)

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
        ("/api/run/nothere", 404),
        ("/api/series/nothere", 404),
        ("/api/series/{one}?first=x", 400),
        ("/api/series/{one}?first=9&last=1", 400),
        ("/api/series/{one}?n=0", 400),
        ("/api/series/{one}?last=99999999999999999999999", 400),
        ("/api/sound/{one}?name=recipe.toml", 404),
        ("/api/sound/{one}?name=../two/recipe.toml", 404),
        ("/api/sound/{one}?name=%00", 404),
        ("/api/picture/{one}", 404),
    ],
)
def test_what_cannot_be_asked_is_told_so(served, folder, path, status):
    found, _, body = served.ask(path.format(one=run_id(folder / "one")))

    assert found == status
    assert b"Traceback" not in body


def test_a_step_and_a_new_run_are_told_as_they_come(served, folder):
    name = run_id(folder / "one")
    before = served.json(f"/api/series/{name}")["last_step"]
    live = socket.create_connection((served.host, served.port), timeout=30)
    request = f"GET /api/live HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nCookie: {served.cookie}\r\n\r\n"
    live.sendall(request.encode())
    heard = b""
    add_steps(folder / "one", before + 1, 1)
    write_run(folder / "three", n_steps=5)

    while not (f'"last_step": {before + 1}'.encode() in heard and b'"name": "three"' in heard):
        more = live.recv(65536)
        assert more, heard
        heard += more

    assert b"event: grown" in heard
    assert b"event: runs" in heard
    live.close()


def test_a_run_that_is_deleted_is_no_fault(served, folder):
    path = write_run(folder / "gone", n_steps=5)
    name = run_id(path)
    until(lambda: any(run["name"] == "gone" for run in served.json("/api/runs")))
    served.json(f"/api/series/{name}")
    for file in path.iterdir():
        file.unlink()
    path.rmdir()

    until(lambda: all(run["name"] != "gone" for run in served.json("/api/runs")))
    assert served.ask(f"/api/run/{name}")[0] == 404


def test_it_listens_on_this_machine_alone(served):
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", served.port), timeout=5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_while_a_page_listens(folder, number):
    with dashboard(folder) as served, socket.create_connection((served.host, served.port), timeout=30) as live:
        host, cookie = f"Host: 127.0.0.1:{served.port}", f"Cookie: {served.cookie}"
        live.sendall(f"GET /api/live HTTP/1.1\r\n{host}\r\n{cookie}\r\n\r\n".encode())
        assert live.recv(100)

        served.process.send_signal(number)
        _, told = served.process.communicate(timeout=30)

    assert "Traceback" not in told
    assert served.process.returncode == {signal.SIGINT: 0, signal.SIGTERM: -signal.SIGTERM}[number]


def test_a_mistake_is_one_sentence(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])

        assert main(["dashboard", str(tmp_path), "--port", port]) == 2
    assert f"Nothing can listen at 127.0.0.1, port {port}" in capsys.readouterr().err
    assert main(["dashboard", str(tmp_path / "nowhere")]) == 2
    assert "There is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["dashboard", "--port", "70000"])
    assert "from 0, for any that is free, to 65535" in capsys.readouterr().err
    assert main(["dashboard", str(tmp_path), "--open-to", "no.such.host.invalid"]) == 2
    assert "no.such.host.invalid" in capsys.readouterr().err


def test_the_library_for_pages_imports_no_torch():
    code = "import sys; import unbraid.web.server, unbraid.web.report; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
