"""The table of targets, filled from the rows that gpu_kernels.py wrote: ratios against the peers of the same run.

python benchmarks/gpu_table.py [benchmarks/results/gpu_kernels.jsonl]

A line has the worst case and the median case; ratios are speeds (a peer's time over ours) unless they say otherwise. Where no
peer was installed there is nothing to say, and a dash says that.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["LINES", "fill", "show"]

Row = dict[str, Any]
Case = dict[str, Row]
"""What was timed together: kernel -> row."""


def _us(case: Case, kernel: str) -> float:
    return float(case[kernel]["us_p50"])


def _over_peers(bits: tuple[int, ...], rows: tuple[int, int], peers: tuple[str, ...]) -> Callable[[Case], Iterator[float]]:  # fmt: skip
    """The fastest peer's time over ours, where the input has so many rows."""

    def ratios(case: Case) -> Iterator[float]:
        if not rows[0] <= next(iter(case.values()))["m"] <= rows[1]:
            return
        for b in bits:
            found = [_us(case, name) for p in peers if (name := p.format(b=b)) in case]
            if found and f"bitatlas W{b}" in case:
                yield min(found) / _us(case, f"bitatlas W{b}")

    return ratios


def _over(kernel: str, ours: str, rows: tuple[int, int]) -> Callable[[Case], Iterator[float]]:
    """One kernel's time over another's."""

    def ratios(case: Case) -> Iterator[float]:
        names = [kernel] if kernel != "launch per width" else [k for k in case if k.startswith(kernel)]
        if rows[0] <= next(iter(case.values()))["m"] <= rows[1] and ours in case and set(names) & set(case):
            yield min(_us(case, n) for n in names if n in case) / _us(case, ours)

    return ratios


def _mixed(case: Case) -> Iterator[float]:
    """Time of mixed experts over that of uniform ones, weighted by the chosen experts of each width."""
    share = case.get("mixed", {}).get("share", {})
    if share and all(f"uniform W{b}" in case for b in share):
        yield _us(case, "mixed") / sum(s * _us(case, f"uniform W{b}") for b, s in share.items())


def _decode(pairs: tuple[str, ...], tokens: tuple[int, int], bytes_too: bool) -> Callable[[Case], Iterator[float]]:  # fmt: skip
    """16-bit attention's time over ours; with ``bytes_too`` our time over what the bytes alone would take."""

    def ratios(case: Case) -> Iterator[float]:
        peers = [k for k in case if not k.startswith("bitatlas")]
        if not peers or not tokens[0] <= next(iter(case.values()))["tokens"] <= tokens[1]:
            return
        best = min(peers, key=lambda k: _us(case, k))
        for pair in pairs:
            ours = case.get(f"bitatlas {pair}")
            if ours is not None:
                speed = _us(case, best) / float(ours["us_p50"])
                yield case[best]["nbytes"] / ours["nbytes"] / speed if bytes_too else speed

    return ratios


def _of_copy(case: Case) -> Iterator[float]:
    """Bytes per second over those of a plain copy."""
    if "copy" in case:
        for name, row in case.items():
            if name != "copy":
                yield row["gb_per_s"] / case["copy"]["gb_per_s"]


ANY = (0, 1 << 40)
_FAST = ("gemlite W{b}", "torchao W{b}")
# Row of the table, what the figure is, the kind of case, target (at least, or "<=" at most), how it is found.
LINES: tuple[tuple[str, str, str, str, Callable[[Case], Iterator[float]]], ...] = (
    ("1a", "W4, 1-8 rows, over the fastest peer", "linear", ">= 1.25", _over_peers((4,), (1, 8), _FAST)),
    ("1a", "W4, 1-8 rows, over gemlite", "linear", ">= 1.7", _over_peers((4,), (1, 8), _FAST[:1])),
    ("1b", "W2 and W3, 1-8 rows, over the fastest peer", "linear", ">= 1.5", _over_peers((2, 3), (1, 8), _FAST)),
    ("1c", "W4, 16-64 rows, over the fastest peer", "linear", ">= 1.0", _over_peers((4,), (16, 64), _FAST)),
    ("1c", "W4, 256 rows and more, over cuBLAS", "linear", ">= 0.95", _over_peers((4,), (256, 1 << 40), ("cublas W16",))),
    ("2a", "uniform W4 experts, over dense bf16 ones", "experts", ">= 1.0", _over("dense W16", "uniform W4", ANY)),
    ("2b", "time of mixed experts over uniform ones, by share", "experts", "<= 1.10", _mixed),
    ("2b", "mixed, 1-16 rows, over a launch per width", "experts", ">= 1.5", _over("launch per width", "mixed", (1, 16))),
    ("2b", "mixed, 64-256 rows, over a launch per width", "experts", ">= 1.15", _over("launch per width", "mixed", (64, 256))),
    ("3", "4-bit K/V, 32k tokens and more, over bf16", "kv", ">= 2.0", _decode(("kv4-token",), (32000, 1 << 40), False)),
    ("3", "2-bit K/V, 32k tokens and more, over bf16", "kv", ">= 2.8", _decode(("kv2-channel/kv2-token",), (32000, 1 << 40), False)),
    ("3", "time over the bytes' worth, mixed K/V, 32k and more", "kv", "<= 1.10",
     _decode(("kv8-channel/kv4-token", "kv4-channel/kv2-token"), (32000, 1 << 40), True)),
    ("3", "4-bit K/V, under 8k tokens, over bf16", "kv", ">= 0.95", _decode(("kv4-token",), (0, 8191), False)),
    ("4", "packing and dequantising, bytes/s over a copy's", "packing", ">= 0.85", _of_copy),
)  # fmt: skip


def fill(rows: list[Row]) -> list[dict[str, Any]]:
    """One line per target from the rows of one run: row, what, target, worst, median, cases; None without a peer."""
    cases: dict[tuple[str, str], Case] = defaultdict(dict)
    for r in rows:
        share = {"share": {int(b): s for b, s in r["share"].items()}} if "share" in r else {}
        cases[r["what"], json.dumps(r["case"], sort_keys=True)][r["kernel"]] = {**r, **r["case"], **share}
    out = []
    for row, what, kind, target, ratios in LINES:
        found = sorted(x for (k, _), case in cases.items() if k == kind for x in ratios(case))
        at_most = target.startswith("<=")
        worst = (found[-1] if at_most else found[0]) if found else None
        out.append({"row": row, "what": what, "target": target, "worst": worst,
                    "median": statistics.median(found) if found else None, "cases": len(found)})  # fmt: skip
    return out


def show(lines: list[dict[str, Any]]) -> str:
    """The lines as text."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    head = f"{'row':<4}{'what':<54}{'target':>9}{'worst':>8}{'median':>8}{'cases':>7}"
    return "\n".join([head, *(f"{x['row']:<4}{x['what']:<54}{x['target']:>9}{cell(x['worst']):>8}{cell(x['median']):>8}{x['cases']:>7}" for x in lines)])  # fmt: skip


def main() -> None:
    """Print the table of the file's last run."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/gpu_kernels.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    print(show(fill([r for r in rows if r["run"] == rows[-1]["run"]])))


if __name__ == "__main__":
    main()
