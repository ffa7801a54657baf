"""Bits of K and V by layer, as text."""

from __future__ import annotations

import numpy as np
import pytest

from bitatlas.analysis.schema import KvGeometry, KvLayout, KvTable, UserError
from bitatlas.app.kv_plan import decode_kv, encode_kv, kv_pairs
from bitatlas.app.views.fit_controls import Asked, decode_question, encode_question, twin
from bitatlas.app.views.kv import best_bits
from bitatlas.solvers import FrontCache, Problem


def test_text_and_back():
    layers = (0, 1, 2, 4, 5)
    assert decode_kv("8/4", layers) == dict.fromkeys(layers, (8, 4))
    assert decode_kv("8", (3,)) == {3: (8, 8)}
    mixed = decode_kv("0-2=8/8;4=8/4;1=2/2", layers)
    assert mixed == {0: (8, 8), 1: (2, 2), 2: (8, 8), 4: (8, 4), 5: (16, 16)}
    rng = np.random.default_rng(0)
    for _ in range(50):
        plan = {n: tuple(int(b) for b in rng.choice([2, 4, 8, 16], 2)) for n in layers}
        assert decode_kv(encode_kv(plan), layers) == plan
    assert encode_kv(dict.fromkeys(range(30), (8, 4))) == "8/4"


@pytest.mark.parametrize("text", ["8/5", "x", "3=8/8", "9=8/8", "0-2", "=8/8/8"])
def test_what_cannot_be_read(text):
    with pytest.raises(UserError):
        decode_kv(text, (0, 1, 2, 4))


def test_layers_that_the_model_lacks_are_layers_of_the_option_not_units_of_a_link():
    with pytest.raises(UserError, match="layers of the K and V bits") as caught:
        decode_kv("0-9=8/4", (0, 1, 2, 3))
    assert "0-9=8/4: layer 9, but the model has layers 0 to 3" in caught.value.found
    assert "link" not in str(caught.value)


def test_formats_bytes_and_links(dense):
    pairs = kv_pairs(dense.index, "0-3=8/4;5=16/8")
    assert sorted(pairs) == [0, 1, 2, 3, 5]
    assert pairs[0].name == "kv8-channel/kv4-token"
    assert pairs[5].name == "kv16/kv8-token"
    whole, less = (
        Asked("fisher", ("int4-g64",), 1 << 24, 2048, 1, kv, 0).budget(dense.index)
        for kv in ("16/16", "0-3=8/4")
    )
    assert (
        less.kv_bytes
        == dense.index.kv.plan_bytes(kv_pairs(dense.index, "0-3=8/4"), 2048, 1, KvLayout())
        < whole.kv_bytes
    )
    asked = Asked("fisher", ("int4-g64",), 1 << 24, 2048, 1, "0-3=8/4", 0)
    assert decode_question(encode_question(asked)) == asked
    with pytest.raises(UserError, match="cannot be read"):
        decode_question(encode_question(asked).replace("8/4", "7/4"))
    assert "--kv-plan 0-3=8/4" in twin("/m", asked, {})


def test_the_metrics_plan_gives_bits_where_they_hurt(fakes):
    index = fakes.dense_index(12)
    table = KvTable.from_rows(fakes.kv_rows(index), "kv_fisher", KvLayout())
    geometry = KvGeometry((2,) * 12, 16, (0,) * 12)
    bits = np.array([2, 4, 8])
    front = FrontCache.of(
        Problem.of(np.array([[3.0], [1.0]]) * 4.0**-bits, np.array([[90_000], [70_000]]) * bits, 0)
    )
    low, high = int(front.cum_bytes[0]), int(front.cum_bytes[-1])
    plan = decode_kv(
        best_bits(front, table, geometry, memory=low + 2_500_000, context=4096, batch=1), geometry.layers
    )
    assert plan[0][0] >= plan[11][0]
    assert sum(k for k, _ in plan.values()) >= sum(v for _, v in plan.values())  # K hurts five times as much
    rich = best_bits(front, table, geometry, memory=high + 64_000_000, context=4096, batch=1)
    assert rich == "16/16"
