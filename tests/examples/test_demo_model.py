"""The demo model that ships: whole, small enough, and good enough to show something."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from bitatlas.analysis.model_index import index_model

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "app" / "demo"


@pytest.fixture(scope="module")
def figures():
    """The card's measurement, on fewer tokens."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        measure = importlib.import_module("demo_measure").measure
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return measure(DEMO / "shakespeare-moe", DEMO / "text" / "eval.txt", 2048, 512)


def test_it_is_a_small_sharded_checkpoint():
    files = [f for part in ("shakespeare-moe", "text") for f in (DEMO / part).iterdir()]
    assert sum(f.stat().st_size for f in files) <= 6_300_000
    shards = {f.name for f in files if f.suffix == ".safetensors"}
    index = json.loads((DEMO / "shakespeare-moe" / "model.safetensors.index.json").read_text())
    assert len(shards) >= 2
    assert shards == set(index["weight_map"].values())


def test_every_expert_projection_is_a_unit():
    index = index_model(DEMO / "shakespeare-moe")
    experts = [u for u in index.units if u.expert >= 0]
    assert len(experts) == 4 * 8 * 3
    assert len(index.units) == 4 * 8 * 3 + 4 * 4 + 1  # attention, and the tied embedding once


def test_held_out_text_is_not_calibration_text():
    held_out, calibration = (
        {line.strip() for line in (DEMO / "text" / f"{name}.txt").read_text().splitlines() if len(line) > 30}
        for name in ("eval", "calibration")
    )
    assert len(held_out) > 1500
    assert len(calibration) > 3000
    assert not held_out & calibration


def test_two_bits_hurt_and_eight_do_not(figures):
    kl = figures["kl_nats_per_token"]
    assert figures["perplexity"] < 40
    assert kl["int2-g64"] > 0.3
    assert kl["int2-g64"] > 4 * kl["int3-g64"] > 12 * kl["int4-g64"]
    assert kl["int8-g64"] < 1e-3


def test_experts_are_used_unevenly_and_all_of_them(figures):
    for layer in figures["expert_usage"]:
        assert min(layer) > 0
        assert max(layer) > 1.5 * min(layer)


def test_experts_differ_in_what_two_bits_do_to_them(figures):
    damage = [d for layer in figures["expert_kl_int2_g64"] for d in layer]
    assert min(damage) > 0
    assert max(damage) > 5 * min(damage)


def test_the_card_and_the_benchmark_agree():
    report = json.loads((ROOT / "benchmarks" / "demo_model.json").read_text())
    card = (DEMO / "shakespeare-moe" / "README.md").read_text()
    assert f"perplexity {report['perplexity']:.2f}" in card
    assert report["command"] in card
    for name, kl in report["kl_nats_per_token"].items():
        assert f"| {name} | {kl:.4f} |" in card
