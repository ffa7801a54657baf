"""A real server and a real Chromium. Every page opened here is watched: console errors and requests that leave."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
ARGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
READY = "[data-testid='stApp'][data-test-script-state='notRunning']"


def _module(name: str, path: Path) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them on one xdist worker: two Chromiums on two cores only slow each other down."""
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.xdist_group("browser"))


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    """tests/app/fakes.py."""
    return _module("app_fakes", HERE.parent / "app" / "fakes.py")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, fakes: ModuleType) -> Path:
    """A data folder with a dense study and one of 48 x 128 experts."""
    from bitatlas.cache.paths import Home
    from bitatlas.cache.store import Store

    root = tmp_path_factory.mktemp("browser") / "home"
    store = Store(Home(root))
    fakes.fill(store, fakes.moe_index())
    fakes.fill(store, fakes.dense_index(12, "dense-12"))
    return root


@pytest.fixture(scope="session")
def server(home: Path) -> Iterator[str]:
    """The dashboard's address; started with the very command that ``bitatlas serve`` uses."""
    from bitatlas.app.serve import streamlit_command

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"BITATLAS_HOME": str(home), "BITATLAS_MODEL_ROOTS": str(home)}
    log = (home.parent / "server.log").open("w")
    process = subprocess.Popen(streamlit_command(port), env=env, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(f"{url}/_stcore/health", timeout=2) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.2)
        else:
            raise RuntimeError(
                f"the server did not start: {(home.parent / 'server.log').read_text()[-2000:]}"
            )
        yield url
    finally:
        process.terminate()
        process.wait(20)


class Watched:
    """A browser window and what went wrong in it."""

    def __init__(self, page: Any, base: str) -> None:
        self.page, self.base = page, base
        self.complaints: list[str] = []
        page.set_default_timeout(60_000)
        page.on("console", self._console)
        page.on("pageerror", lambda e: self.complaints.append(f"error: {e}"))
        page.on("request", self._request)

    def _console(self, message: Any) -> None:
        # Streamlit looks for its base path below the page's address first and gets a 404 for it; that is how it works.
        if message.type == "error" and "_stcore" not in (message.location or {}).get("url", ""):
            self.complaints.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.base, self.base.replace("http", "ws"), "data:", "blob:")):
            self.complaints.append(f"left the machine: {request.url}")

    def goto(self, path: str) -> None:
        """Open a page and wait until it is drawn."""
        self.page.goto(self.base + path)
        self.page.wait_for_selector(".st-key-frame")
        self.settle()

    def settle(self) -> None:
        """Until the script has run and the page stands still."""
        self.page.wait_for_timeout(250)
        self.page.wait_for_selector(READY)
        self.page.wait_for_timeout(250)

    def chart(self) -> dict[str, float]:
        """Wait for the chart; the box of its last panel in pixels."""
        self.page.wait_for_selector(".js-plotly-plot .main-svg")
        self.page.wait_for_timeout(500)
        box = self.page.locator(".js-plotly-plot .nsewdrag").last.bounding_box()
        assert box is not None
        return box

    def drag(self, box: dict[str, float], start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag over a box; corners as shares of its width and height."""
        x, y, w, h = box["x"], box["y"], box["width"], box["height"]
        mouse = self.page.mouse
        mouse.move(x + start[0] * w, y + start[1] * h)
        mouse.down()
        mouse.move(x + end[0] * w, y + end[1] * h, steps=6)
        mouse.up()
        self.settle()

    def selected(self) -> int:
        """Units in the selection chip."""
        words = self.page.locator(".st-key-frame").inner_text().replace(",", "").split()
        return int(words[words.index("units") - 1]) if "units" in words else 0


@pytest.fixture(scope="session")
def _playwright() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        yield playwright


@pytest.fixture
def browser(_playwright: Any, server: str, tmp_path: Path) -> Iterator[Callable[..., Watched]]:
    """``browser()`` opens a new, empty browser (not only a tab); all of them must have stayed quiet at the end."""
    chromium = _module("ensure_chromium", HERE / "ensure_chromium.py").find()
    if chromium is None:
        pytest.skip("no Chromium on this machine; see tests/browser/ensure_chromium.py")
    opened: list[tuple[Any, Watched]] = []

    def open_one(scheme: str = "light") -> Watched:
        context = _playwright.chromium.launch_persistent_context(
            str(tmp_path / f"profile{len(opened)}"), executable_path=chromium, headless=True, args=ARGS,
            viewport={"width": 1440, "height": 900}, color_scheme=scheme, accept_downloads=True,
        )  # fmt: skip
        watched = Watched(context.pages[0], server)
        opened.append((context, watched))
        return watched

    yield open_one
    for context, _ in opened:
        context.close()
    assert [c for _, w in opened for c in w.complaints] == []
