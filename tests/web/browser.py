"""A real browser that can reach only this machine, and a record of its requests and errors."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlsplit

import pytest
from dashboard_process import until
from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


@cache
def chromium():
    """Return the path of a browser, installed if need be; without one the test fails in CI and is skipped elsewhere."""
    path = _installed_browser()
    if path is None and shutil.which("apt-get") and os.geteuid() == 0:
        for arguments in (["update", "-qq"], ["install", "-y", "-qq", "chromium"]):
            subprocess.run(["apt-get", *arguments], check=False, capture_output=True, timeout=600)
        path = _installed_browser()
    if path is None:
        reason = "Chromium was not found. Install it (package chromium on Debian) to test the page."
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def _installed_browser():
    for name in NAMES:
        path = shutil.which(name)
        if path:
            return path
    return None


@contextmanager
def open_page(**context):
    """Open a page in a fresh browser, with its requests in ``page.requested`` and its errors in ``page.errors``."""
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    sandbox = ["--no-sandbox"] if is_root else []  # Chromium refuses to run as root in its sandbox
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=[*FLAGS, *sandbox])
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(60_000)
        page.requested = []
        page.errors = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda entry: page.errors.append(entry.text) if entry.type in ("error", "warning") else None)
        page.on("dialog", lambda dialog: (page.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        try:
            yield page
        finally:
            browser.close()


def wait_until_true(page, expression, *, seconds=60):
    """Wait for a JavaScript expression. Playwright's own wait uses eval, which the page's security policy forbids."""
    until(lambda: page.evaluate(expression), seconds=seconds)


def foreign_requests(page, server=None):
    """Return the addresses requested from anywhere but the page's own server."""
    own = f"{server.host}:{server.port}" if server else ""
    parts = [urlsplit(address) for address in page.requested]
    return [part.geturl() for part in parts if part.scheme not in ("data", "blob", "file") and part.netloc != own]


COLOURS_IN_CHART = """key => {
  const canvas = document.querySelector(`#chart-${key} canvas`);
  if (!canvas) return [];
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const counts = new Map();
  for (let at = 0; at < data.length; at += 4) {
    if (data[at + 3] < 200) continue;
    const colour = `#${[0, 1, 2].map((k) => data[at + k].toString(16).padStart(2, "0")).join("")}`;
    counts.set(colour, (counts.get(colour) || 0) + 1);
  }
  return [...counts].filter(([, n]) => n > 20).map(([colour]) => colour);
}"""


def colours_in_chart(page, key):
    """Return the colours of a chart's opaque pixels."""
    return set(page.evaluate(COLOURS_IN_CHART, key))
