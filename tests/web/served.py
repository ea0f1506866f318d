"""A dashboard as a user starts it: a process of its own, that tells its link."""

import http.client
import json
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit


class Served(NamedTuple):
    """Where a dashboard answers, and the token of its link."""

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

    def ask(self, path, *, method="GET", cookie=True, **headers):
        """Status, headers and body."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=given | ({"Cookie": self.cookie} if cookie else {}))
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), body

    def json(self, path):
        status, _, body = self.ask(path)
        assert status == 200, body
        return json.loads(body)


@contextmanager
def dashboard(*paths, words=()):
    """Start `unbraid dashboard`, and end it."""
    command = [sys.executable, "-m", "unbraid", "dashboard", *map(str, paths), *(words or ("--port", "0"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        link = None
        while link is None and (line := process.stdout.readline()):
            link = re.search(r"http://\S+", line)
        assert link, process.stderr.read()
        parts = urlsplit(link[0])
        yield Served(parts.hostname, parts.port, parts.query.removeprefix("token="), process)
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=20)


def until(holds, *, seconds=30):
    """Wait for something to hold, and fail if it does not."""
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it did not come to hold"
        time.sleep(0.05)
