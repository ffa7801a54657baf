"""From a key press to the painted chart, in a real Chromium, on a synthetic store of 18 432 expert units x 6 formats.

    python benchmarks/page_latency.py --presses 40

Starts the page server on a data folder of its own, opens Experts, Map and Metrics, presses the arrow keys on the format slider and
notes in the browser the time from the key press to the first animation frame after the chart was drawn. Appends one JSON line a page to
benchmarks/results/page_latency.jsonl, with the machine's load: other processes on the same cores make pages slower.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "experts": "quantity=damage",
    "map": "metric=fisher_projection",
    "metrics": "metric_x=fisher_projection&metric_y=alphaq_alpha",
}
READY = "[data-testid='stApp'][data-test-script-state='notRunning']"
WATCH = """() => {
  window.painted = [];
  window.pressed = 0;
  addEventListener('keydown', () => { window.pressed = performance.now(); }, true);
  const gd = document.querySelector('.js-plotly-plot');
  gd.on('plotly_afterplot', () => requestAnimationFrame(() => window.painted.push(performance.now())));
}"""


def module(path: Path) -> ModuleType:
    """A Python file of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def start(root: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The page server on a filled store, and its address."""
    from bitatlas.app.serve import streamlit_command
    from bitatlas.cache.paths import Home
    from bitatlas.cache.store import Store

    fakes = module(ROOT / "tests" / "app" / "fakes.py")
    fakes.fill(Store(Home(root)), fakes.moe_index())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"BITATLAS_HOME": str(root)}
    process = subprocess.Popen(
        streamlit_command(port), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{url}/_stcore/health", timeout=2):
                return process, url
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the page server did not start")


def latencies(page: Any, url: str, presses: int) -> list[float]:
    """Milliseconds from key press to paint; the first two presses warm the caches and do not count."""
    page.goto(url)
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=120_000)
    page.wait_for_selector(READY, timeout=120_000)
    page.wait_for_timeout(1500)
    page.evaluate(WATCH)
    slider = page.locator(".st-key-format [role=slider]").first
    out = []
    for i in range(presses + 2):
        slider.focus()
        page.evaluate("window.painted = []")
        page.keyboard.press("ArrowRight" if i // 3 % 2 == 0 else "ArrowLeft")
        page.wait_for_function("window.painted.length > 0", timeout=60_000)
        out.append(page.evaluate("window.painted[0] - window.pressed"))
        page.wait_for_selector(READY)
        page.wait_for_timeout(150)
    return out[2:]


def main() -> None:
    """Measures each page and writes the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presses", type=int, default=40)
    parser.add_argument("--out", default="benchmarks/results/page_latency.jsonl")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = module(ROOT / "tests" / "browser" / "ensure_chromium.py").find()
    if chromium is None:
        sys.exit("no Chromium on this machine; see tests/browser/ensure_chromium.py")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process, url = start(Path(folder) / "home")
        try:
            with sync_playwright() as api, Path(args.out).open("a") as out:
                window = api.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
                page = window.new_page(viewport={"width": 1440, "height": 900})
                for name, query in PAGES.items():
                    found = latencies(page, f"{url}/{name}?{query}", args.presses)
                    p50, p95 = np.quantile(found, [0.5, 0.95])
                    record = {
                        "page": name, "p50_ms": round(float(p50), 1), "p95_ms": round(float(p95), 1), "presses": len(found), "units": 48 * 128 * 3,
                        "formats": 6, "cores": os.cpu_count(), "load": os.getloadavg()[0], "browser": window.version,
                        "device": platform.machine(), "python": platform.python_version(),
                    }  # fmt: skip
                    out.write(json.dumps(record) + "\n")
                    print(record)
        finally:
            process.terminate()
            process.wait(20)


if __name__ == "__main__":
    main()
