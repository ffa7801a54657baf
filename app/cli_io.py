"""How the command line prints: one JSON document, or a short text for people. No result is computed here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, TextIO

from bitatlas.analysis.schema import null_nan
from bitatlas.app.sizes import format_bytes
from bitatlas.app.views.words import duration

__all__ = ["emit", "progress_printer", "say_estimate", "spoken_lines"]


def emit(data: Any, json_output: bool, shape: str) -> None:
    """Print ``data`` as one JSON document, or as text in the named shape."""
    if json_output:
        print(json.dumps(null_nan(data), allow_nan=False))
        return
    _SHAPES[shape](data)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k}={_cell(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value)
    return "" if value is None else str(value)


def _table(rows: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = rows["rows"] if isinstance(rows, dict) else rows
    if not rows:
        print("nothing to show")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(v) for v in row.values()))
    # Not a terminal: no wrapping, so that grep and awk see whole rows.
    Console(width=None if sys.stdout.isatty() else 10_000, highlight=False).print(table)


def _pairs(data: dict[str, Any]) -> None:
    width = max((len(k) for k in data), default=0)
    for key, value in data.items():
        if value and isinstance(value, dict):
            print(f"{key.replace('_', ' ')}:")
            for k, v in value.items():
                print(f"  {k}: {_cell(v)}")
        elif value not in (None, "", [], {}):
            print(f"{key.replace('_', ' '):<{width}}  {_cell(value)}")


_TIMES = ("created", "started", "ended")


def _job(data: dict[str, Any]) -> None:
    """A job's status with times as people read them; ``fraction`` only while a step is in hand."""
    shown: dict[str, Any] = {
        k: _moment(v) if k in _TIMES and isinstance(v, int | float) else v for k, v in data.items()
    }
    fraction = float(shown.pop("fraction", 0.0))
    if 0.0 < fraction < 1.0:
        shown["of this step"] = f"{fraction:.0%}"
    # What was left out and why is what one looks for last.
    _pairs({**{k: v for k, v in shown.items() if k != "skipped"}, "skipped": shown.get("skipped")})


def _moment(seconds: float) -> str:
    """Local time in ISO 8601, with its distance from UTC."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _scan(data: dict[str, Any]) -> None:
    print(
        f"{data['name']}: {data['architecture']}, {data['units']} units, {data['params'] / 1e6:.1f} M weights, {data['layers']} layers"
    )
    if data["experts"]:
        print(f"{data['experts']} routed experts a layer, {data['top_k']} per token")
    print(f"kept as they are: {data['kept_tensors']} tensors, {format_bytes(data['kept_bytes'])}")
    for note in data["notes"]:
        print(f"note: {note}")
    _table([{**r, "shapes": " ".join(r["shapes"])} for r in data["roles"]])
    _table(
        [
            {**r, "size": format_bytes(r["bytes"])}
            for r in data["formats"]
            if r["name"].endswith(("g64", "bf16"))
        ]
    )


def _allocation(data: dict[str, Any]) -> None:
    on = "on the real model" if data["searched"] else f"on {data['metric']}"
    on += f" with {data['quantizer']}" if data.get("quantizer") not in (None, "", "rtn") else ""
    print(
        f"{data['bits_per_weight']:.3f} bits per weight, {format_bytes(data['weights_bytes'])} ({data['status']}, {data['solver']} {on})"
    )
    if data.get("target"):
        print(
            f"in {data['target']}: {data['engine_bits']:.3f} bits per weight, {format_bytes(data['engine_bytes'])} ({data['engine_bytes']} bytes)"
        )
    if data["searched"]:
        print(f"measured KL {data['predicted']:.4g} nats per token on the search's text")
    else:
        print(
            f"predicted damage {data['predicted']:.4g}; gap to the lower bound {_cell(data['gap']) or 'unknown'}"
        )
    for name, count in data["histogram"].items():
        print(f"  {name:<16} {count['units']:>6} units  {count['share']:.1%} of the units")
    if data.get("kv"):
        print(f"KV cache {format_bytes(data['kv_bytes'])} in all")
        for name, layers in data["kv"].items():
            print(f"  {name:<26} {layers:>3} layers")
    if data.get("file"):
        print(f"written to {data['file']}")


def _verify(data: dict[str, Any]) -> None:
    results = data.get("results")
    if results is None:
        _pairs(data)
        return
    _table([{k: v for k, v in r.items() if not isinstance(v, list | dict)} for r in results])


_TRUST = ("metric", "badge", "flips", "flip_spearman", "flip_within", "allocations", "spearman", "band_least", "ratio",
          "top_overlap", "cost_ratio_same_text", "calibration_least", "text_least")  # fmt: skip


def _trust(data: dict[str, Any]) -> None:
    _table([{name: row[name] for name in _TRUST} for row in data["rows"]])
    if data["out"]:
        print(f"the whole table: {data['out']}")


def _text(data: dict[str, Any]) -> None:
    print(data["text"])


_FEW = 20  # reasons, and units, of a verdict that are printed; --json has all


def _export(data: dict[str, Any]) -> None:
    print(f"{data['target']}: {data['status']}")
    if data["status"] != "rejected":
        print(
            f"size: {format_bytes(data['bytes'])} of weights in the engine's container ({data['bytes']} bytes)"
        )
    if len(data["reasons"]) < len(data["units"]):  # else the units alone say it
        _some([f"  {reason}" for reason in data["reasons"]], "reasons")
    changes = data["changes"]
    if data["change"]:
        print(
            f"what helps: {data['change']}"
            + ("; `bitatlas check --repair FILE` writes it so" if changes else "")
        )
    _some(
        [f"  {u}: {why}" + (f" -> {changes[u]}" if u in changes else "") for u, why in data["units"].items()],
        "units",
    )
    for note in data["notes"]:
        print(f"note: {note}")
    if data.get("kv"):
        print(f"KV cache: {data['kv']}")
    if fixed := data.get("repaired"):
        rest = f", {format_bytes(fixed['over_budget'])} over its budget" if fixed["over_budget"] else ""
        print(
            f"repaired: {fixed['changed']} units changed, {format_bytes(fixed['bytes'])} in the engine's container{rest}"
        )
        if fixed["pins_dropped"]:
            print(f"  {fixed['pins_dropped']} pins do not hold any more")
        print(f"written to {fixed['file']}")
    for name in data.get("files", []):
        print(f"wrote {name}")
    if data.get("command"):
        print(f"run: {data['command']}")


def _some(lines: list[str], what: str) -> None:
    for line in lines[:_FEW]:
        print(line)
    if len(lines) > _FEW:
        print(f"  and {len(lines) - _FEW} more {what}; --json has all")


def _engines(data: dict[str, Any]) -> None:
    rows = data["engines"]
    _table(
        [{"target": r["target"], "status": r["status"], "size": "" if r["status"] == "rejected" else format_bytes(r["bytes"]),
          "reasons": r["reasons"], "change": r["change"]} for r in rows]
    )  # fmt: skip
    for row in rows:
        for note in row["notes"] if row["status"] != "rejected" else ():
            print(f"{row['target']}: {note}")


def _answers(data: dict[str, Any]) -> None:
    if "answers" not in data:
        _pairs(data)
        return
    from bitatlas.app.views.verify import build_answers

    view = build_answers(data)
    for row in view.rows:
        print(
            f"> {row['prompt']}  [{row['change']}]\n  original: {row['original']}\n  packed:   {row['packed']}"
        )
    print(f"{view.title}\n{view.detail}")


def spoken_lines(stream: TextIO, quiet: bool = False) -> Iterator[str]:
    """Lines of a terminal (with a prompt before each) or of a pipe, until it ends."""
    asks = stream.isatty() and not quiet
    while True:
        if asks:
            print("> ", end="", flush=True)
        line = stream.readline()
        if not line:
            return
        yield line


_SHAPES: dict[str, Callable[[Any], None]] = {
    "table": _table, "job": _job, "scan": _scan, "allocation": _allocation, "verify": _verify, "text": _text,
    "export": _export, "engines": _engines, "trust": _trust, "answers": _answers,
}  # fmt: skip


def say_estimate(total: dict[str, Any]) -> None:
    """One line on stderr: what a measurement is about to cost."""
    tokens = total["forward_tokens"] + total["backward_tokens"]
    through = f", {tokens:,} tokens through the model" if tokens else ""
    print(
        f"estimate: about {duration(total['seconds'])}, {total['steps']} steps{through}; what is measured already costs nothing",
        file=sys.stderr,
        flush=True,
    )


def progress_printer(quiet: bool) -> Callable[[Any], None]:
    """A callback that shows a job's progress on stderr: a live line on a terminal, else one line per change."""
    last: list[str] = [""]

    def show(status: Any) -> None:
        if quiet:
            return
        low, high = status.eta_s if status.eta_s else (None, None)
        eta = "" if low is None or high is None else f", about {duration(low)} to {duration(high)} left"
        line = f"{status.title}: {status.state}, {status.done}/{status.total} {status.phase}{eta}"
        if line == last[0]:
            return
        last[0] = line
        if sys.stderr.isatty():
            print(
                f"\r\x1b[2K{line}",
                end="" if status.state in ("queued", "running") else "\n",
                file=sys.stderr,
                flush=True,
            )
        elif status.total and (status.done == status.total or status.done % max(1, status.total // 10) == 0):
            print(line, file=sys.stderr, flush=True)

    return show
