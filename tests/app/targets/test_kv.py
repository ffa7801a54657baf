"""K/V plans in the engines' words: exact where they can be, and honest where not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitatlas.analysis.schema import KvGeometry
from bitatlas.app.targets import TARGETS
from bitatlas.app.targets.kv import kv_setting


@pytest.fixture
def plan(make_index, allocate):
    index = replace(make_index("llama", layers=4), kv=KvGeometry((2,) * 4, 32, (0,) * 4))

    def make(*pairs: tuple[str, str]):
        kv = {i: pair for i, pair in enumerate(pairs) if pair[0]}
        return replace(allocate(index, "int4-g64-sym"), kv=kv), index

    return make


K8, K4, K2 = ("kv8-channel", "kv8-token"), ("kv4-channel", "kv4-token"), ("kv2-channel", "kv2-token")


def test_one_pair_for_all_is_exact(plan):
    for engine, flags in (("vllm", "--kv-cache-dtype fp8"), ("llama.cpp", "--cache-type-k q8_0 --cache-type-v q8_0 -fa on"),
                          ("mlx", "--kv-bits 8 --kv-group-size 64")):  # fmt: skip
        setting = kv_setting(engine, *plan(K8, K8, K8, K8))
        assert (setting.flags, setting.exact) == (flags, True)
    split = kv_setting("llama.cpp", *plan(*[("kv8-channel", "kv4-token")] * 4))
    assert split.flags == "--cache-type-k q8_0 --cache-type-v q4_0 -fa on"
    assert kv_setting("vllm", *plan(*[("kv8-channel", "kv4-token")] * 4)).flags.endswith("turboquant_k8v4")


def test_vllm_leaves_16_bit_layers_out_by_name(plan):
    setting = kv_setting("vllm", *plan(("", ""), K8, K8, ("", "")))
    assert setting.flags == "--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0 3"
    assert setting.exact


def test_a_mix_is_rounded_up_on_average_and_said(plan):
    setting = kv_setting("llama.cpp", *plan(K8, K4, K4, K4))
    assert setting.bits == (8, 8)
    assert not setting.exact
    assert "0 layers get fewer bits than planned, 3 get more" in setting.notes[0]
    setting = kv_setting("llama.cpp", *plan(K8, K2, K2, K2))
    assert setting.bits == (4, 4)
    assert "1 layers get fewer bits than planned, 3 get more" in setting.notes[0]
    wide = kv_setting("mlx", *plan(("", ""), ("", ""), ("", ""), K8))
    assert (wide.flags, wide.exact) == ("", False)
    assert "stays at 16 bits" in wide.notes[0]


def test_no_plan_changes_nothing_and_a_plan_reaches_commands_and_verdicts(plan):
    none, index = plan(("", ""), ("", ""), ("", ""), ("", ""))
    mixed, _ = plan(K8, K4, K4, K4)
    for target in TARGETS.values():
        assert target.kv(none, index).flags == ""
        assert target.kv(none, index).notes == ()
        assert any("KV" in n for n in target.check(mixed, index).notes), target.NAME
    assert "--kv-cache-dtype fp8" in TARGETS["vllm"].command(mixed, index)
    assert "--cache-type-k q8_0" in TARGETS["llama.cpp"].command(mixed, index)
    assert "cache-type" not in TARGETS["llama.cpp"].command(none, index)
