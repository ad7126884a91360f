"""JupyterLab on 127.0.0.1 with settings of its own, and a Chromium to look at it.

`make test-browser` runs this folder; `make test` leaves it out, because it needs a browser.
SCREENSHOTS=some/folder keeps a picture at the end of each test, of the explorer if the page shows one; it has
the name of the notebook, or else of the test. README's is made so.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
HOW = "Debian: apt-get install chromium"
NEWS = {"fetchNews": "false", "checkForUpdates": False}  # else it asks a server, and the reader


def find_chromium() -> str | None:
    wanted = os.environ.get("CHROMIUM")
    return shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, BROWSERS)), None)


class Lab:
    """A running JupyterLab. root: its folder, with data_samples/ beside notebooks/."""

    def __init__(self, port: int, root: Path) -> None:
        self.url, self.root, self.token = f"http://127.0.0.1:{port}", root, secrets.token_hex(16)

    def ask(self, method: str, path: str) -> bytes:
        """The server's REST interface, past any proxy."""
        header = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(f"{self.url}/api/{path}", headers=header, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.read()

    def wait(self, process: subprocess.Popen, log: Path) -> None:
        for _ in range(240):
            try:
                self.ask("GET", "status")
                return
            except OSError:  # not listening yet
                if process.poll() is not None:
                    break
                time.sleep(0.5)
        pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")

    def end_kernels(self) -> None:
        for session in json.loads(self.ask("GET", "sessions")):
            self.ask("DELETE", f"sessions/{session['id']}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """JupyterLab with its own settings: what the user has configured plays no part."""
    if find_spec("playwright") is None:
        pytest.skip("playwright is not installed: `make test-browser` does it")
    if find_chromium() is None:
        pytest.skip(f"no Chromium ({HOW}), or say CHROMIUM=/path/to/chrome")
    home = tmp_path_factory.mktemp("jupyter")
    root = home / "root"
    (root / "notebooks").mkdir(parents=True)
    shutil.copytree(ROOT / "data_samples", root / "data_samples")
    settings = home / "settings"
    news = settings / "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps(NEWS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lab, log = Lab(port, root), home / "server.log"
    places = {
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": settings,
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "IPYTHONDIR": home / "ipython",
    }
    environment = {
        **os.environ,
        **{key: str(path) for key, path in places.items()},
        "JUPYTER_TOKEN": lab.token,
        "JUPYTER_PREFER_ENV_PATH": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={root}"]
    command += ["--allow-root"] if os.geteuid() == 0 else []
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        lab.wait(process, log)
        yield lab
    finally:
        process.terminate()  # the server ends its kernels
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def keep_picture(page, path: Path) -> None:
    from PIL import Image

    explorer = page.locator(".aia-explorer")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.set_viewport_size({"width": 1280, "height": 2000})  # all of it is seen at once: nothing scrolls
    page.wait_for_timeout(2000)
    (explorer.first if explorer.count() else page).screenshot(path=path)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the bytes


@pytest.fixture
def page(lab, tmp_path, request):
    """A fresh browser that reaches this JupyterLab only; page.outside: what else it asked for."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=find_chromium(),
            headless=True,
            args=FLAGS,
            viewport={"width": 1280, "height": 1000},
        )
        context.set_default_timeout(60_000)
        page = context.pages[0]
        page.outside = []

        def here_only(route):
            if route.request.url.startswith((lab.url, "data:", "blob:")):
                return route.continue_()
            page.outside.append(route.request.url)
            return route.abort()

        context.route("**/*", here_only)
        yield page
        if folder := os.environ.get("SCREENSHOTS"):
            case = getattr(request.node, "callspec", None)
            keep_picture(page, Path(folder) / f"{case.id if case else request.node.name}.png")
        context.close()
    lab.end_kernels()  # the next test starts from nothing
