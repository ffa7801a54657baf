"""Checkpoints in the engines' own containers, loaded back by the engines' own code: logits compared with ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import FORMATS, QuantUnit
from bitatlas.app.targets import REJECTED, SERVABLE, TARGETS, WRONG
from bitatlas.app.work.engine_checkpoint import write_engine_checkpoint
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.packing import unpack_codes
from bitatlas.kernels.reference import quantize, quantize_dequantize

CT = TARGETS["compressed-tensors"]
Pick = Callable[[QuantUnit], str]


def export(tiny_checkpoint, allocate, tmp_path: Path, family: str, pick: Pick):
    """A checkpoint in compressed-tensors' container; the index, the allocation and the folder."""
    wide = {"hidden_size": 64, "intermediate_size": 96}
    wide |= {"moe_intermediate_size": 32} if "moe" in family else {}
    index = index_model(tiny_checkpoint(family, **wide))
    plan = allocate(index, {u.key: "bf16" if u.role in ("embed", "head") else pick(u) for u in index.units})
    folder = write_engine_checkpoint(CT.container(), index, plan, tmp_path / "out", shard_bytes=20_000)
    return index, plan, folder


def expert_bits(u: QuantUnit) -> str:
    return "int4-g32-sym" if u.expert >= 0 and u.layer == 0 else "int8-g32-sym"


@pytest.mark.parametrize(
    ("family", "pick", "verdict", "loads"),
    [
        ("llama", lambda u: "int4-g32-sym" if u.layer else "int8-g32-sym", SERVABLE, True),
        ("llama", lambda u: "int3-g32-sym" if u.layer else "int6-channel-sym", SERVABLE, True),
        ("llama", lambda u: "int2-g32-sym" if u.layer else "int5-g32-sym", SERVABLE, True),
        ("llama", lambda u: "int4-g32", REJECTED, False),
        ("llama", lambda u: "fp8-tensor" if u.layer else "fp8-channel", SERVABLE, True),
        ("llama", lambda u: "fp8-tensor" if u.layer else "int4-g32-sym", SERVABLE, True),
        ("llama", lambda u: "int4-g64-sym" if u.cols % 64 else "int8-g32-sym", REJECTED, False),  # ragged
        ("qwen3_moe", lambda u: "int4-g32-sym" if u.expert >= 0 else "int8-g32-sym", SERVABLE, True),
        ("qwen3_moe", expert_bits, WRONG, True),
        ("qwen3_moe", lambda u: "int4-g32-sym" if u.expert in (0, 1) else "int8-g32-sym", WRONG, True),
    ],
)
def test_the_verdict_is_what_transformers_does(
    family: str, pick: Pick, verdict: str, loads: bool, tiny_checkpoint, allocate, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    index, plan, folder = export(tiny_checkpoint, allocate, tmp_path, family, pick)
    assert CT.check(plan, index).status == verdict
    if not loads:
        with pytest.raises((RuntimeError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
                torch.ones(1, 2, dtype=torch.long)
            )
        return
    client = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = LoadedModel.open(index)
    weights = {
        u.key: quantize_dequantize(ours.handle(u.key).get(), FORMATS[plan.formats[u.key]])
        for u in index.units
        if plan.formats[u.key] != "bf16"
    }
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = ours.logits(ids)
        with ours.swapped(weights):
            want = ours.logits(ids)
        wrong = (client(ids).logits - want).abs().max().item()
    error = (plain - want).abs().max().item()  # of quantising itself
    assert wrong <= 0.01 * error if verdict == SERVABLE else wrong > error


def test_the_container_holds_the_codes(tiny_checkpoint, allocate, tmp_path: Path) -> None:
    index, plan, folder = export(tiny_checkpoint, allocate, tmp_path, "llama", lambda u: "int3-g32")
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(where.values())) > 1
    tensors = {k: v for name in set(where.values()) for k, v in load_file(folder / name).items()}
    assert set(tensors) == set(where)
    ours = LoadedModel.open(index)
    for unit in index.units:
        if plan.formats[unit.key] == "bf16":
            assert torch.equal(tensors[unit.tensor], ours.handle(unit.key).get())
            continue
        q = quantize(ours.handle(unit.key).get(), FORMATS["int3-g32"])
        assert torch.equal(unpack_codes(tensors[f"{unit.key}.weight_packed"], 3, unit.cols), q.codes)
        assert torch.equal(tensors[f"{unit.key}.weight_scale"], q.scales)
        zeros = tensors[f"{unit.key}.weight_zero_point"].T.contiguous()
        assert torch.equal(unpack_codes(zeros, 3, unit.rows).T, q.zeros)
        assert tensors[f"{unit.key}.weight_shape"].tolist() == [unit.rows, unit.cols]
    payload = sum(t.numel() * t.itemsize for t in tensors.values())
    floats = sum(2 * u.params for u in index.units if plan.formats[u.key] == "bf16")
    assert payload - floats == CT.engine_bytes(
        plan, index
    )  # the tables are float32 here, 2 bytes in the estimate
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_nothing_is_left_behind(
    tiny_checkpoint, allocate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="not an empty folder"):
        export(tiny_checkpoint, allocate, tmp_path, "llama", lambda u: "int4-g32-sym")
    (tmp_path / "out" / "mine").unlink()
    container = type(CT.container())

    def fail(*args: object) -> None:
        raise UserError("broken")

    monkeypatch.setattr(container, "tensors", fail)
    with pytest.raises(UserError, match="broken"):
        export(tiny_checkpoint, allocate, tmp_path, "llama", lambda u: "int4-g32-sym")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_the_task_writes_weights_only_where_they_are_served(
    tiny_checkpoint, allocate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitatlas.app import tasks

    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path / "home"))
    source = tiny_checkpoint("llama", hidden_size=64, intermediate_size=96)
    index = index_model(source)
    good = allocate(index, "int4-g32-sym")
    done = tasks.export(good, "vllm", tmp_path / "vllm", model=str(source), weights=True, quantizer="mse")
    assert any(f.endswith("-of-00001.safetensors") for f in done["files"])
    with pytest.raises(UserError, match="own tools"):
        tasks.export(good, "auto-round", tmp_path / "gguf", model=str(source), weights=True)
    bad = allocate(index, "int3-g32")
    with pytest.raises(UserError, match="rejects"):
        tasks.export(bad, "vllm", tmp_path / "bad", model=str(source), weights=True)
    assert not (tmp_path / "gguf").exists()
    assert not (tmp_path / "bad").exists()
