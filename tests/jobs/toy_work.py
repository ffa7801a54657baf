"""A job for tests: sleeps, gives rows, and fails in every way a job can fail. Logs each step it computes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from bitatlas.analysis.schema import UserError
from bitatlas.app.jobs.work import Work


class Toy(Work):
    KIND = "toy"

    def plan(self) -> list[str]:
        return [f"s{i}" for i in range(self.params.get("steps", 4))]

    def runs(self) -> list[dict[str, Any]]:
        if self.params.get("no_run"):
            return []
        return [
            {"run": run, "model_digest": "m", "metric": "toy", "formats": ["int4-g64"]} for run in self.keys()
        ]

    def keys(self) -> list[str]:
        """Run of the even and of the odd steps: one and the same, or two."""
        return self.params.get("runs") or [self.run_key]

    @property
    def run_key(self) -> str:
        return self.params["run"]

    def run(self, key: str) -> dict[str, Any]:
        i = int(key[1:])
        fault = self.params.get("faults", {}).get(key)
        # A fault with a file beside it happens once only.
        once = self.home.root / f"{self.run_key}.fault"
        if fault and not (self.params.get("once") and once.exists()):
            once.touch()
            self.fail(fault)
        print(f"computing {key}", flush=True)
        until = time.monotonic() + self.params.get("seconds", 0.05)
        while time.monotonic() < until:
            time.sleep(0.01)
        self.report(f"at {key}", 1.0)
        if self.params.get("runs"):
            return {"rows": {self.keys()[i % 2]: self.rows(i)}}
        return {"rows": self.rows(i), "note": f"n{i}"}

    def rows(self, i: int) -> list[list[Any]]:
        return [["toy", f"u{i}.{j}", "int4-g64", i + j / 8, float("nan"), 1, 0.0] for j in range(3)]

    def fail(self, fault: str) -> None:
        if fault == "user":
            raise UserError("the toy is broken", found="a crack", fix="glue")
        if fault == "bug":
            raise KeyError("a bug")
        if fault == "memory":
            raise MemoryError
        if fault == "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (self.home.root / "child.pid").write_text(str(child.pid))
            time.sleep(600)
        if fault == "hang":
            time.sleep(600)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "bus": signal.SIGBUS, "segv": signal.SIGSEGV}[fault])

    def finish(self) -> dict[str, Any]:
        last = [["toy_sum", "all", "-", 1.5, float("nan"), 1, 0.0]]
        return {
            "rows": [] if "runs" in self.params or "no_run" in self.params else last,
            "answer": 42,
            "pid": os.getpid(),
        }
