"""Headless Chromium, and a TensorBoard server, as a user has them."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from PIL import Image
from selenium import webdriver

T = TypeVar("T")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-proxy-server"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--window-size=1280,1000"),
)


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """The installed Chromium under its own driver (nothing is downloaded); skips the test where there is none."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs Chromium and chromedriver on the PATH (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def requested(browser: webdriver.Chrome) -> list[str]:
    """The addresses that pages have asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def screenshot(browser: webdriver.Chrome, path: Path) -> int:
    """Save what is seen; the number of its colours (a blank page has one)."""
    assert browser.save_screenshot(str(path))
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(image.width * image.height)
    assert colours is not None
    return len(colours)


@contextlib.contextmanager
def tensorboard(folder: Path, log: Path) -> Iterator[str]:
    """A TensorBoard server on a free port of this machine; its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:

        def address() -> str | None:
            assert process.poll() is None, log.read_text()
            found = re.search(r"at (http://127\.0\.0\.1:\d+/)", log.read_text())
            return found[1] if found else None

        yield wait_for(address)
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition: Callable[[], T | None], seconds: float = 60.0) -> T:
    """The first true answer."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.2)
    return found


class Board:
    """TensorBoard's data as its pages get them."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def get(self, path: str, **query: str) -> Any:
        """JSON of a data address."""
        with self.open(f"{self.address}data/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{self.address}data/{path}", json.dumps(content).encode())
        request.add_header("Content-Type", "application/json")
        with self.open(request, timeout=30) as answer:
            return json.load(answer)

    def picture(self, **query: str) -> Image.Image:
        """The newest picture of a tag."""
        newest = self.get("plugin/images/images", sample="0", **query)[-1]
        address = f"{self.address}data/plugin/images/individualImage?{newest['query']}"
        with self.open(address, timeout=30) as answer, Image.open(answer) as image:
            image.load()
            return image
