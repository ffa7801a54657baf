"""The table of targets from rows of a run."""

from __future__ import annotations

import pytest
from gpu_table import fill, show


def rows(what: str, case: dict[str, int], times: dict[str, float], **more: object) -> list[dict]:
    return [
        {"what": what, "case": case, "kernel": n, "us_p50": us, "nbytes": 100, "gb_per_s": 100 / us, **more}
        for n, us in times.items()
    ]


def line(filled: list[dict], what: str) -> dict:
    (found,) = [x for x in filled if x["what"] == what]
    return found


def test_the_fastest_peer_counts_and_the_worst_case_is_shown() -> None:
    filled = fill([
        *rows("linear", {"n": 8, "k": 8, "m": 1}, {"bitatlas W4": 10, "gemlite W4": 20, "torchao W4": 15}),
        *rows("linear", {"n": 9, "k": 8, "m": 1}, {"bitatlas W4": 10, "gemlite W4": 30}),
        *rows("linear", {"n": 8, "k": 8, "m": 256}, {"bitatlas W4": 10, "gemlite W4": 1, "cublas W16": 9}),
    ])  # fmt: skip
    one = line(filled, "W4, 1-8 rows, over the fastest peer")
    assert (one["worst"], one["median"], one["cases"]) == (1.5, 2.25, 2)
    assert line(filled, "W4, 1-8 rows, over gemlite")["worst"] == 2
    assert line(filled, "W4, 256 rows and more, over cuBLAS")["worst"] == 0.9
    none = line(filled, "W2 and W3, 1-8 rows, over the fastest peer")
    assert (none["worst"], none["cases"]) == (None, 0)


def test_mixed_experts() -> None:
    case = {"n": 8, "k": 8, "m": 1}
    times = {
        "mixed": 11,
        "uniform W2": 5,
        "uniform W8": 20,
        "launch per width": 33,
        "launch per width, forked": 22,
    }
    found = rows("experts", case, times)
    found[0]["share"] = {"2": 0.5, "8": 0.5}  # keys as JSON has them
    filled = fill(found)
    assert line(filled, "time of mixed experts over uniform ones, by share")["worst"] == pytest.approx(
        11 / 12.5
    )
    assert line(filled, "mixed, 1-16 rows, over a launch per width")["worst"] == 2


def test_kv_by_its_bytes() -> None:
    found = rows(
        "kv",
        {"tokens": 32768},
        {
            "bitatlas kv4-token": 25,
            "bitatlas kv8-channel/kv4-token": 50,
            "torch sdpa bf16": 100,
            "flash-attn bf16": 80,
        },
    )
    for r in found:
        r["nbytes"] = {"bitatlas kv4-token": 25, "bitatlas kv8-channel/kv4-token": 40}.get(r["kernel"], 100)
    filled = fill(found)
    assert line(filled, "4-bit K/V, 32k tokens and more, over bf16")["worst"] == 3.2
    # 40 bytes of 100 are worth 32 of 80 us; 50 are 1.5625 times that.
    assert line(filled, "time over the bytes' worth, mixed K/V, 32k and more")["worst"] == pytest.approx(
        50 / 32
    )
    assert line(filled, "4-bit K/V, under 8k tokens, over bf16")["cases"] == 0


def test_packing_is_held_against_a_copy() -> None:
    filled = fill(rows("packing", {"n": 8, "k": 8}, {"copy": 10, "pack W3": 20, "dequantize W4": 12.5}))
    one = line(filled, "packing and dequantising, bytes/s over a copy's")
    assert (one["worst"], one["cases"]) == (0.5, 2)
    assert "0.50" in show(filled)
