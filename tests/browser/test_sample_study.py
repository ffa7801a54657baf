"""`bitatlas serve` on an empty data folder: the sample study is there, and its way from the map to a file works."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation
from bitatlas.app.tasks import demo_path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a dashboard started as `make run` starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = tmp_path_factory.mktemp("served")
    log = (root / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "bitatlas.app.cli", "serve", "--port", str(port)],
        env=os.environ | {"BITATLAS_HOME": str(root / "home")}, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, (root / "log").read_text()
            assert time.monotonic() < deadline, (root / "log").read_text()
            try:
                if urllib.request.urlopen(f"{url}/_stcore/health", timeout=2).status == 200:
                    break
            except OSError:
                time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def window(browser, served: str):
    """A browser window on that dashboard."""
    b = browser()
    b.base = served
    return b


def test_map_to_box_to_fit_to_budget_to_file(window, tmp_path: Path):
    b = window
    b.goto("/map")
    assert "shakespeare-moe" in b.page.content()
    b.drag(b.chart(), (0.1, 0.2), (0.6, 0.6))
    b.page.wait_for_selector(".st-key-clear_selection")
    assert b.selected() > 0

    b.page.get_by_role("link", name="Fit", exact=True).click()
    b.page.wait_for_url("**/fit*")
    b.settle()
    b.page.get_by_role("button", name=re.compile("^.*Pin.*$")).first.click()
    b.settle()
    slider = b.page.locator(".st-key-memory input[type=range]")
    before = slider.input_value()
    bits = _bits(b)
    slider.focus()
    for _ in range(12):
        slider.press("ArrowRight")
    b.settle()
    assert slider.input_value() != before
    assert "memory=" in b.page.url
    assert _bits(b) > bits

    with b.page.expect_download() as arrived:
        b.page.locator(".st-key-download_allocation button").click()
    file = tmp_path / "allocation.json"
    arrived.value.save_as(file)
    allocation = Allocation.from_json(file.read_text())
    allocation.check_model(index_model(demo_path()))
    assert len(allocation.pins) > 0
    assert all(allocation.formats[u] == f for u, f in allocation.pins.items())
    assert allocation.bits_per_weight == pytest.approx(_bits(b), abs=0.006)
    assert json.loads(file.read_text())["metric"] == allocation.metric


def _bits(b) -> float:
    """Effective bits per weight as the page says them."""
    text = b.page.locator(
        "[data-testid=stCaptionContainer]", has_text="effective bits per weight"
    ).first.inner_text()
    return float(re.search(r"([\d.]+) effective bits", text)[1])


@pytest.mark.parametrize("page", ["verify", "export", "metrics", "kv", "unit"])
def test_the_other_pages_have_something_to_show(window, page: str):
    b = window
    b.goto(f"/{page}")
    heading = b.page.locator("h2").first.inner_text()
    assert heading
    assert not re.search(r"nothing|\byet\b", heading.lower())
    assert b.page.locator("[data-testid=stException]").count() == 0
