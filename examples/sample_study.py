"""Make the sample study of the demo model that ships in app/demo/study: metrics, their truth, some plans, all verified.

    python examples/sample_study.py            # writes app/demo/study (a few minutes on two cores)

With BITATLAS_HOME set it works in that data folder, and goes on where an earlier call was stopped.

The study is what the dashboard opens on. It is made by the same jobs that anybody runs, in a data folder of its own,
from the demo's own texts: calibration and evaluation text are different works.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORMATS = "int{2,3,4,5,6,8}-g64"
ALLOCATIONS = 96
BUDGETS = (2.5, 3.0, 3.5, 4.0, 4.5)
UNIFORM = ("int2-g64", "int3-g64", "int4-g64", "int6-g64")
RIVALS = ("kl_flip", "fisher", "fisher_projection", "hawq_trace", "activation_error", "alphaq")


def make(folder: Path) -> None:
    """Measure, solve, verify, export into ``folder`` (replaced as a whole)."""
    from bitatlas.app import tasks
    from bitatlas.cache.paths import Home
    from bitatlas.cache.store import Store

    def told(status: object) -> None:
        sys.stderr.write(f"\r{status.title[:60]}: {status.done}/{status.total} {status.phase}   ")  # type: ignore[attr-defined]

    # The truth first: the newest run of a metric is what pages show, and these flips cover three formats only.
    tasks.truth(
        "demo", flips=0, allocations=ALLOCATIONS, formats=FORMATS, tokens=2048, seq_len=128, on_progress=told
    )
    tasks.measure("demo", "fisher_projection,weight_error,activation_error,alphaq,routing,massive_activations", formats=FORMATS,
                  tokens=16384, seq_len=128, wait=True, on_progress=told)  # fmt: skip
    tasks.measure(
        "demo", "kv_output,kv_fisher,kv_flip,kv_error", tokens=4096, seq_len=256, wait=True, on_progress=told
    )
    tasks.measure(
        "demo", "kl_flip,hawq_trace", formats=FORMATS, tokens=4096, seq_len=128, wait=True, on_progress=told
    )
    plans = [
        tasks.solve("demo", metric="fisher_anchored", solver="mckp", formats=FORMATS, bits=b) for b in BUDGETS
    ]
    plans += [
        tasks.solve("demo", metric="fisher_anchored", solver="uniform", formats=name, bits=16)
        for name in UNIFORM
    ]
    plans += [tasks.solve("demo", metric=m, solver="mckp", formats=FORMATS, bits=3.0) for m in RIVALS]
    plans += [
        tasks.solve("demo", metric="fisher_anchored", solver=s, formats=FORMATS, bits=3.5)
        for s in ("attention_high", "first_last")
    ]
    tasks.verify("demo", plans, tokens=8192, seq_len=256, wait=True, on_progress=told)
    tasks.frontier("demo", metric="fisher_anchored", formats=FORMATS, points=64)
    draft = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    Store(Home.default()).export_study(tasks.open_index("demo").digest, draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def main() -> None:
    """Entry point."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "app" / "demo" / "study"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        os.environ.setdefault("BITATLAS_HOME", home)
        start = time.monotonic()
        make(target.resolve())
        size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
        print(f"\n{target}: {size / 1e6:.2f} MB in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
