"""From a key press to the painted chart, in a real Chromium, on a synthetic store of 18 432 expert units x 6 formats.

    python benchmarks/page_latency.py --presses 40

Starts the page server on a data folder of its own, opens the pages, presses keys (arrows on a slider, Enter on a button) and
notes in the browser the time from the key press to the end of the first frame in which the new chart is drawn. Other processes on the
same cores make pages slower: the machine's load is noted, and the CPU time of server and browser for each press (until everything is
at rest again), which does not depend on it. Appends one JSON line a page to benchmarks/results/page_latency.jsonl.
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
import psutil

ROOT = Path(__file__).resolve().parent.parent
STUDY = "study=moe-48x128@6d6f652d"
FORMAT = ".st-key-format input[type=range]"
PAGES = {  # query, what is pressed, the chart that has to be painted
    "experts": ("quantity=damage", FORMAT, "expert_map"),
    "map": ("metric=fisher_projection", FORMAT, "map_chart"),
    "metrics": ("metric_x=fisher_projection&metric_y=alphaq_alpha", FORMAT, "rank_scatter"),
    "unit": ("unit_metric=fisher_projection", ".st-key-unit_Better button", "damage_curve"),
    "kv": ("", ".st-key-kv_memory input[type=range]", "kv_split"),
    "fit": ("fit_metric=fisher_projection", ".st-key-memory input[type=range]", "front_chart"),
}
READY = "[data-testid='stApp'][data-test-script-state='notRunning']"
# A chart whose figure changes is a new element with an emitter of its own; its first drawing counts, at the end of the frame.
WATCH = """
window.painted = {};
addEventListener('keydown', () => { window.painted = {}; window.pressed = performance.now(); }, true);
Object.defineProperty(HTMLElement.prototype, 'emit', {configurable: true, get() { return undefined; }, set(emit) {
  const gd = this;
  const heard = function (name, ...more) {
    if (name === 'plotly_afterplot') {
      const key = ((gd.closest('[class*=st-key-]') || gd).className.match(/st-key-(\\w+)/) || [])[1];
      requestAnimationFrame(() => setTimeout(() => { window.painted[key] ??= performance.now() - window.pressed; }, 0));
    }
    return emit.call(gd, name, ...more);
  };
  Object.defineProperty(gd, 'emit', {configurable: true, writable: true, value: heard});
}});
"""


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
    store, index = Store(Home(root)), fakes.moe_index()
    fakes.fill(store, index)
    kv_rows = fakes.kv_rows(index)
    store.begin_run("run-kv", index.digest, "kv_fisher", formats=tuple(sorted({r.format for r in kv_rows})))
    store.write_step("run-kv", "all", kv_rows)
    store.finish_run("run-kv")
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


def cpu_ms(processes: list[psutil.Process]) -> float:
    """CPU time of these processes so far."""
    total = 0.0
    for process in processes:
        try:
            spent = process.cpu_times()
        except psutil.Error:
            continue
        total += spent.user + spent.system
    return total * 1e3


def latencies(page: Any, url: str, pressed: str, chart: str, presses: int, server: int) -> np.ndarray:
    """(presses, 3) milliseconds from key press to paint, CPU of the server, CPU of the browser; two presses before do not count."""
    page.goto(url)
    page.wait_for_selector(f".st-key-{chart} .js-plotly-plot", state="attached")
    page.wait_for_selector(READY)
    page.wait_for_timeout(3000)
    slider = page.locator(pressed).first
    key = page.evaluate("e => e.tagName", slider.element_handle()) == "BUTTON"
    ours = [psutil.Process(server)]
    browser = [p for p in psutil.Process().children(recursive=True) if "chrom" in p.name()]
    out = []
    for i in range(presses + 2):
        slider.focus()
        page.wait_for_timeout(200)
        before = cpu_ms(ours), cpu_ms(browser)
        page.keyboard.press("Enter" if key else "ArrowRight" if i // 3 % 2 == 0 else "ArrowLeft")
        page.wait_for_function(f"window.painted['{chart}'] !== undefined")
        page.wait_for_timeout(600)
        page.wait_for_selector(READY)
        page.wait_for_timeout(300)
        out.append(
            (
                page.evaluate(f"window.painted['{chart}']"),
                cpu_ms(ours) - before[0],
                cpu_ms(browser) - before[1],
            )
        )
    return np.array(out[2:])


def main() -> None:
    """Measures each page and writes the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presses", type=int, default=40)
    parser.add_argument("--pages", nargs="+", default=list(PAGES), choices=list(PAGES))
    parser.add_argument("--note", default="", help="a word for the record: what was changed")
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
                page.set_default_timeout(300_000)
                page.add_init_script(WATCH)
                for name in args.pages:
                    query, pressed, chart = PAGES[name]
                    before = os.getloadavg()[0]
                    found = latencies(
                        page, f"{url}/{name}?{STUDY}&{query}", pressed, chart, args.presses, process.pid
                    )
                    wall, server, browser = (
                        np.quantile(found, [0.2, 0.5, 0.8, 0.95], axis=0).round(1).T.tolist()
                    )
                    record = {
                        "page": name, "note": args.note, "p20_ms": wall[0], "p50_ms": wall[1], "p80_ms": wall[2], "p95_ms": wall[3],
                        "server_cpu_p50_ms": server[1], "browser_cpu_p50_ms": browser[1], "server_cpu_p95_ms": server[3],
                        "browser_cpu_p95_ms": browser[3], "presses": len(found), "units": 48 * 128 * 3, "formats": 6, "cores": os.cpu_count(),
                        "load_before": before, "load_after": os.getloadavg()[0], "browser": window.version,
                        "device": platform.machine(), "python": platform.python_version(),
                    }  # fmt: skip
                    out.write(json.dumps(record) + "\n")
                    out.flush()
                    print(record, flush=True)
        finally:
            process.terminate()
            process.wait(20)


if __name__ == "__main__":
    main()
