"""The app as a person starts it, in a process of its own, and a browser to look at it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]


@contextmanager
def running(
    folder: Path, *arguments: str, **surroundings: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The app on a free port, with `folder` for what it keeps and says; its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "ITERIS_SD_DATA": str(folder / "data"),
        "TMPDIR": str(folder),
    }
    command = [sys.executable, *(arguments or ("app.py",))]
    with (folder / "said.txt").open("wb") as output:
        app = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | told | surroundings,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(url, timeout=5)
                break
            except OSError:
                assert app.poll() is None, (folder / "said.txt").read_text()
                time.sleep(0.2)
        else:
            raise AssertionError((folder / "said.txt").read_text() or "the app does not answer")
        yield url, app
    finally:
        app.terminate()
        try:
            app.wait(30)
        except subprocess.TimeoutExpired:
            app.kill()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, or whichever there is."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
