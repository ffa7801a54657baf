"""Mixes that engines get wrong: the engine's own rule, imitated on what we write, beside what `check` says of it.

vLLM does not install here; the rules are those read in its source: a fused layer has one scheme, that of its first shard,
the scheme of a MoE layer is that of expert 0, and a word of an expert holds 32 // bits whole codes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import FORMATS, Format
from bitatlas.app import tasks
from bitatlas.app.targets import REJECTED, SERVABLE, TARGETS, WRONG
from bitatlas.app.views.export import build_engines
from bitatlas.app.work.engine_checkpoint import write_engine_checkpoint
from bitatlas.kernels.packing import packed_words, unpack_codes
from bitatlas.kernels.reference import Quantized, dequantize, quantize_dequantize

VLLM = TARGETS["vllm"]


def decode(tensors: dict[str, torch.Tensor], keys: list[str], cols: int, fmt: Format) -> torch.Tensor:
    """The rows of ``keys`` under one scheme, as an engine that fuses them reads them; ValueError where shapes differ."""
    packed = [tensors[f"{k}.weight_packed"] for k in keys]
    scales = [tensors[f"{k}.weight_scale"] for k in keys]
    want = (packed_words(cols, fmt.bits), fmt.groups(cols))
    if any((p.shape[1], s.shape[1]) != want for p, s in zip(packed, scales)):
        raise ValueError("size mismatch")
    return dequantize(
        Quantized(unpack_codes(torch.cat(packed), fmt.bits, cols), torch.cat(scales), None, fmt)
    )


def written(tiny_checkpoint, allocate, tmp_path: Path, family: str, pick):
    wide = {"hidden_size": 64, "intermediate_size": 96} | (
        {"moe_intermediate_size": 32} if "moe" in family else {}
    )
    index = index_model(tiny_checkpoint(family, **wide))
    plan = allocate(index, {u.key: "bf16" if u.role in ("embed", "head") else pick(u) for u in index.units})
    folder = write_engine_checkpoint(VLLM.container(), index, plan, tmp_path / "out")
    tensors = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    return index, plan, tensors


@pytest.mark.parametrize(
    ("role", "other", "verdict"),
    [
        ("k", "int8-g32-sym", REJECTED),
        ("v", "int4-channel-sym", REJECTED),
        ("k", "int4-g32", REJECTED),
        ("", "", SERVABLE),
    ],
)
def test_a_split_fused_layer(
    role: str, other: str, verdict: str, tiny_checkpoint, allocate, tmp_path: Path
) -> None:
    index, plan, tensors = written(
        tiny_checkpoint, allocate, tmp_path, "llama", lambda u: other if u.role == role else "int4-g32-sym"
    )
    answer = VLLM.check(plan, index)
    assert answer.status == verdict
    keys = [f"model.layers.0.self_attn.{r}_proj" for r in "qkv"]
    loaded = LoadedModel.open(index)
    want = torch.cat([quantize_dequantize(loaded.handle(k).get(), FORMATS[plan.formats[k]]) for k in keys])
    try:
        wrong = (decode(tensors, keys, 64, FORMATS["int4-g32-sym"]) - want).abs().max().item()
    except ValueError:
        wrong = float("inf")
    assert (wrong == 0) == (verdict == SERVABLE)
    if verdict == REJECTED:
        assert any("fuses q, k and v" in r for r in answer.reasons)
        assert set(answer.changes) == {k for k in index.unit_keys() if f".{role}_proj" in k}
        fixed = allocate(index, plan.formats | dict(answer.changes))
        assert VLLM.check(fixed, index).status == SERVABLE


def test_experts_that_differ_are_read_as_expert_0(tiny_checkpoint, allocate, tmp_path: Path) -> None:
    index, plan, tensors = written(
        tiny_checkpoint,
        allocate,
        tmp_path,
        "qwen3_moe",
        lambda u: "int4-channel-sym" if u.expert > 1 else "int4-g32-sym",
    )
    verdict = VLLM.check(plan, index)
    assert verdict.status == WRONG
    assert any("expert 0" in r for r in verdict.reasons)
    last = next(
        u for u in index.units if u.expert == 3 and u.role == "down"
    )  # 32 columns: one group, the same shapes
    right = quantize_dequantize(LoadedModel.open(index).handle(last.key).get(), FORMATS["int4-channel-sym"])
    assert torch.equal(decode(tensors, [last.key], 32, FORMATS["int4-g32-sym"]), right)
    wide = next(u for u in index.units if u.expert == 3 and u.role == "up")
    with pytest.raises(
        ValueError, match="size mismatch"
    ):  # what it does not notice in the config, the loader trips over
        decode(tensors, [wide.key], 64, FORMATS["int4-g32-sym"])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_widths_without_a_kernel(bits: int, make_index, allocate) -> None:
    moe, dense = make_index("qwen3_moe", experts=4), make_index()
    name = f"int{bits}-g64-sym"
    verdict = VLLM.check(allocate(moe, {u.key: name if u.expert >= 0 else "bf16" for u in moe.units}), moe)
    assert verdict.status == (SERVABLE if bits in (2, 4, 8) else REJECTED)
    assert all("no kernel" in r for r in verdict.reasons)
    verdict = VLLM.check(allocate(dense, name), dense)
    assert verdict.status == SERVABLE
    assert any("Humming" in n for n in verdict.notes) == (bits not in (4, 8))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_experts_of_other_widths_would_be_decoded_wrong(
    bits: int, tiny_checkpoint, allocate, tmp_path: Path
) -> None:
    name = f"int{bits}-g32-sym"
    index, plan, tensors = written(
        tiny_checkpoint, allocate, tmp_path, "qwen3_moe", lambda u: name if u.expert >= 0 else "bf16"
    )
    unit = next(u for u in index.units if u.expert == 1 and u.role == "up")
    packed, each = tensors[f"{unit.key}.weight_packed"].long() & 0xFFFFFFFF, 32 // bits
    assert (
        packed.shape[1] == unit.cols // each
    )  # the shape that is expected, so that nothing stops the loader
    theirs = (packed[..., None] >> (bits * torch.arange(each))) & ((1 << bits) - 1)
    theirs = theirs.flatten(1)[:, : unit.cols]
    ours = unpack_codes(tensors[f"{unit.key}.weight_packed"], bits, unit.cols)[:, : theirs.shape[1]]
    right = theirs.shape[1] == unit.cols and torch.equal(theirs, ours.long())
    assert (VLLM.check(plan, index).status == SERVABLE) == right
    if not right:
        assert (theirs != ours).float().mean() > 0.5


def test_all_engines_are_asked_at_once(
    make_index, allocate, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint, tmp_path: Path
) -> None:
    index = make_index("qwen3_moe", experts=2)
    plan = allocate(index, "int4-g32")
    rows = build_engines(TARGETS.values(), plan, index)
    assert {r.engine for r in rows} == {t.TITLE for t in TARGETS.values()}
    states = [r.status == SERVABLE for r in rows]
    assert states == sorted(states, reverse=True)
    assert all(bool(r.reason) == bool(r.units) == (r.status != SERVABLE) for r in rows)
    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path))
    folder = tiny_checkpoint("llama")
    index = index_model(folder)
    answer = tasks.check(allocate(index, "int4-g32"), model=str(folder))
    assert [e["target"] for e in answer["engines"]] == list(TARGETS)


def test_the_budget_of_a_target_holds_in_its_own_container(make_index) -> None:
    import numpy as np

    from bitatlas.analysis.schema import Budget, SensitivityTable
    from bitatlas.app.targets.limits import limits_of
    from bitatlas.app.tasks.solving import solve_table

    index = make_index()
    names = ("int3-g64", "int4-g64", "int8-g64", "int4-g32")
    damage = np.random.default_rng(0).lognormal(size=(len(index.units), 1)) * np.array(
        [[1.0, 0.3, 0.01, 0.2]]
    )
    table = SensitivityTable(
        "m", index.unit_keys(), names, damage, damage * np.nan, np.ones(damage.shape), 0.0, "r"
    )
    budget = Budget(int(index.params * 4.45 / 8) + index.kept_bytes)
    free = solve_table(index, table, names, budget, "mckp", {})
    for name in ("llama.cpp", "mlx"):
        target = TARGETS[name]
        plan = solve_table(index, table, names, budget, "mckp", {}, limits_of(target, index, names))
        verdict = target.check(plan, index)
        assert verdict.status == SERVABLE
        assert verdict.bytes <= budget.weights_bytes < target.engine_bytes(free, index)
        own = sum(FORMATS[plan.formats[u.key]].payload_bytes(u.rows, u.cols) for u in index.units)
        assert plan.payload_bytes == own <= budget.weights_bytes
        assert plan.provenance.settings["target"] == name
