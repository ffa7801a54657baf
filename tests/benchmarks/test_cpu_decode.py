"""Single products beside torch's own packed kernels."""

from __future__ import annotations

import cpu_decode
import pytest


def test_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decode, "SHAPES", ((32, 64),))
    rows = cpu_decode.products(1, 3)
    assert {"torch bf16", "torch int4-g32", "torch int8-channel", "bitatlas int4-g32"} <= {
        r["what"] for r in rows
    }
    assert {r["product"] for r in rows} == {"32x64"}
    assert all(0 < r["fastest_us"] <= r["us"] for r in rows)


def test_every_contestant_multiplies() -> None:
    assert {name: run().shape for name, run in cpu_decode.contestants(32, 64).items()} == dict.fromkeys(
        ("torch bf16", "torch int4-g32", "torch int8-channel", *(f"bitatlas {p}" for p in cpu_decode.PRODUCTS)), (1, 32)
    )  # fmt: skip
