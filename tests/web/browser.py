"""A real browser that reaches nothing but this machine, and what it was asked for."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import sync_playwright
from served import until

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
    """The browser that is here, or is installed here; in CI it is never left out."""
    if found := _found():
        return found
    if shutil.which("apt-get") and os.geteuid() == 0:
        for words in (["update", "-qq"], ["install", "-y", "-qq", "chromium"]):
            subprocess.run(["apt-get", *words], check=False, capture_output=True, timeout=600)
    found = _found()
    told = "No Chromium is here: install it (Debian's package chromium), so that the page can be tested."
    if not found and os.environ.get("CI"):
        pytest.fail(told)
    if not found:
        pytest.skip(told)
    return found


def _found():
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def opened(**context):
    """A page of a fresh browser: ``page.asked`` are the addresses it asked for, ``page.faults`` what went wrong."""
    root = ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=[*FLAGS, *root])
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(60_000)
        page.asked, page.faults = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda said: page.faults.append(said.text) if said.type in ("error", "warning") else None)
        page.on("dialog", lambda dialog: (page.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        try:
            yield page
        finally:
            browser.close()


def comes_true(page, words, *, seconds=60):
    """Wait for an expression to hold; the page itself may evaluate no text, so that it is asked again and again."""
    until(lambda: page.evaluate(words), seconds=seconds)


def foreign(page, served=None):
    """Addresses asked for that are not the page's own."""
    own = f"{served.host}:{served.port}" if served else ""
    parts = [urlsplit(address) for address in page.asked]
    return [part.geturl() for part in parts if part.scheme not in ("data", "blob", "file") and part.netloc != own]


INK = """key => {
  const canvas = document.querySelector(`#chart-${key} canvas`);
  if (!canvas) return [];
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const found = new Map();
  for (let at = 0; at < data.length; at += 4) {
    if (data[at + 3] < 200) continue;
    const colour = `#${[0, 1, 2].map((k) => data[at + k].toString(16).padStart(2, "0")).join("")}`;
    found.set(colour, (found.get(colour) || 0) + 1);
  }
  return [...found].filter(([, n]) => n > 20).map(([colour]) => colour);
}"""


def ink(page, key):
    """The colours that a chart is drawn in."""
    return set(page.evaluate(INK, key))
