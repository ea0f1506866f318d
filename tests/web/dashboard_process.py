"""Run the dashboard in a separate process, as a user does."""

import http.client
import json
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit


class Dashboard(NamedTuple):
    """A running dashboard and the token of its link."""

    host: str
    port: int
    token: str
    process: subprocess.Popen

    @property
    def link(self):
        return f"http://{self.host}:{self.port}/?token={self.token}"

    @property
    def cookie(self):
        return f"unbraid-{self.port}={self.token}"

    def request(self, path, *, method="GET", cookie=True, **headers):
        """Return status, headers and body."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=sent | ({"Cookie": self.cookie} if cookie else {}))
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, dict(response.getheaders()), body

    def json(self, path):
        status, _, body = self.request(path)
        assert status == 200, body
        return json.loads(body)


@contextmanager
def dashboard(*paths, options=("--port", "0")):
    """Run `unbraid dashboard` while the context is open."""
    command = [sys.executable, "-m", "unbraid", "dashboard", *map(str, paths), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        link = re.search(r"http://\S+", process.stdout.readline())
        assert link, process.stderr.read()
        parts = urlsplit(link[0])
        yield Dashboard(parts.hostname, parts.port, parts.query.removeprefix("token="), process)
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=20)


def until(condition, *, seconds=30):
    """Wait until a condition holds; fail after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.05)
