"""A GGUF written here, read by the gguf package and by transformers: the weights are ours."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.gguf_header import read_gguf_header
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import FORMATS, UserError
from bitatlas.app.targets import SERVABLE, TARGETS
from bitatlas.app.targets.ggml import exact_type, ggml_type, gguf_name
from bitatlas.app.work.gguf_blocks import blocks_of, ggml_round
from bitatlas.app.work.gguf_checkpoint import write_gguf
from bitatlas.app.work.imatrix import write_imatrix
from bitatlas.kernels.reference import dequantize, quantize, quantize_dequantize

TARGET = TARGETS["llama.cpp"]
EXACT = ("int4-g32-sym", "int5-g32-sym", "int8-g32-sym", "int4-g32", "int5-g32", "mxfp4")


@pytest.mark.parametrize("name", EXACT)
def test_blocks_decode_to_our_weights(name: str) -> None:
    torch.manual_seed(0)
    q = quantize(torch.randn(7, 96) * torch.logspace(-3, 1, 96) + 0.01, FORMATS[name])
    kind = gguf.GGMLQuantizationType[exact_type(FORMATS[name]).upper()]
    got = torch.from_numpy(gguf.quants.dequantize(blocks_of(q), kind))
    want = dequantize(q)
    if FORMATS[name].symmetric:
        assert torch.equal(got, want)
    else:  # the minimum is a float16
        step = q.scales.float().repeat_interleave(32, 1)
        assert ((got - want).abs() <= step / 128 + 1e-9).all()
        assert not torch.equal(got, want)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 2.0**-126, 1.0, 1e30])
def test_mxfp4_is_also_what_the_gguf_package_reads_and_makes(scale: float) -> None:
    """Also where its scale is at the ends of the byte."""
    w = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)) * scale
    q = quantize(w, FORMATS["mxfp4"])
    kind = gguf.GGMLQuantizationType.MXFP4
    assert np.array_equal(gguf.quants.dequantize(blocks_of(q), kind), dequantize(q).numpy())
    if 1e-20 < scale < 1e20:  # elsewhere its own rounding over- or underflows
        theirs = gguf.quants.dequantize(ggml_round(w, "mxfp4"), kind)
        assert np.array_equal(theirs, dequantize(q).numpy())


@pytest.mark.parametrize("name", ["int3-g32", "int8-g32", "int4-g64-sym", "int6-g32-sym"])
def test_other_grids_are_not_passed_off_as_ggmls(name: str) -> None:
    with pytest.raises(ValueError, match="no ggml type"):
        blocks_of(quantize(torch.randn(3, 64), FORMATS[name]))
    assert exact_type(FORMATS[name]) == ""


def test_a_ragged_group_and_a_minimum_beyond_float16_are_errors() -> None:
    with pytest.raises(ValueError, match="40 columns"):
        blocks_of(quantize(torch.randn(3, 40), FORMATS["int4-g32"]))
    with pytest.raises(UserError, match="beyond float16"):
        blocks_of(quantize(torch.full((1, 32), -70000.0), FORMATS["int4-g32"]))
    with pytest.raises(UserError, match="cannot make|can make"):
        ggml_round(torch.randn(2, 256), "q4_k")


def sized(family: str) -> dict[str, int]:
    wide = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    if family.endswith("_moe"):
        wide["moe_intermediate_size"] = 32
    return wide | (
        {"shared_expert_intermediate_size": 32, "mlp_only_layers": []} if family == "qwen2_moe" else {}
    )


def plan_of(index, allocate):
    """Every tensor another type: the exact ones, bf16, and one that the gguf package rounds itself."""
    palette, stacks = [*EXACT, "bf16", "int8-g32"], {}
    return allocate(
        index, {u.key: stacks.setdefault(gguf_name(u), palette[len(stacks) % 8]) for u in index.units}
    )


@pytest.mark.parametrize(
    "family", ["llama", "llama_tied", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "mistral"]
)
def test_the_file_holds_our_weights_and_transformers_computes_our_logits(
    family: str, tiny_checkpoint, allocate, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tiny_checkpoint(family, **sized(family))
    index = index_model(folder)
    plan = plan_of(index, allocate)
    verdict = TARGET.check(plan, index)
    assert verdict.status == SERVABLE
    [file] = TARGET.write_weights(plan, index, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    header = read_gguf_header(file)  # the strict reader of hostile files
    assert file.stat().st_size - min(t.start for t in header.tensors.values()) == verdict.bytes

    ours = LoadedModel.open(index)
    weights = {}
    for u in index.units:
        fmt = FORMATS[plan.formats[u.key]]
        w = ours.handle(u.key).get()
        kind = ggml_type(fmt, u.cols)
        weights[u.key] = quantize_dequantize(w, fmt)
        if exact_type(fmt) != kind:
            raw = gguf.quants.dequantize(ggml_round(w, kind), gguf.GGMLQuantizationType[kind.upper()])
            weights[u.key] = torch.from_numpy(raw)
    read = {t.name: t for t in gguf.GGUFReader(file).tensors}
    for u in index.units:
        t = read[gguf_name(u) + ".weight"]
        values = torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32))
        values = values[u.expert] if u.expert >= 0 else values
        assert values.shape == (u.rows, u.cols)
        close = torch.allclose(
            values.sort(0).values, weights[u.key].sort(0).values, atol=2e-3
        )  # q, k: rows permuted
        assert close, u.key
    if family in ("mixtral", "mistral"):  # transformers reads both as a dense Llama
        assert (family == "mixtral") == any("dense Llama" in n for n in verdict.notes)
        return
    # Its table of keys lacks head_dim and the experts' widths, hence the config.
    config = AutoConfig.from_pretrained(folder)
    client = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, config=config, dtype=torch.float32
    )
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = ours.logits(ids)
        with ours.swapped(weights):
            want = ours.logits(ids)
        assert (client(ids).logits - want).abs().max() <= 0.02 * (plain - want).abs().max()


def test_what_is_not_written_here_is_said_and_leaves_nothing(
    tiny_checkpoint, allocate, tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    index = index_model(tiny_checkpoint("gemma3"))
    with pytest.raises(UserError, match="gemma3_text is not written here"):
        write_gguf(index, allocate(index, "int4-g32"), out)
    index = index_model(tiny_checkpoint("qwen2_moe"))
    with pytest.raises(UserError, match="every layer"):
        write_gguf(index, allocate(index, "int4-g32"), out)
    index = index_model(tiny_checkpoint("llama", hidden_size=256, intermediate_size=512))
    plan = allocate(index, "int4-g64")
    assert any("llama-quantize has to" in n for n in TARGET.check(plan, index).notes)
    with pytest.raises(UserError, match="cannot make q4_k"):
        write_gguf(index, plan, out)
    with pytest.raises(UserError, match="gptq needs a calibration text"):
        write_gguf(index, allocate(index, "int4-g32"), out, quantizer="gptq")
    assert list(tmp_path.iterdir()) == []


def test_an_imatrix_is_the_sum_of_squared_inputs(tiny_checkpoint, tmp_path: Path) -> None:
    index = index_model(tiny_checkpoint("qwen3_moe"))
    loaded = LoadedModel.open(index)
    text = CalibrationSet.of(np.random.default_rng(0).integers(1, 250, (3, 8)), "a text.txt")
    read = gguf.GGUFReader(write_imatrix(loaded, text, tmp_path / "imatrix.gguf"))
    assert read.fields["general.type"].contents() == "imatrix"
    assert read.fields["imatrix.chunk_count"].contents() == 3
    tensors = {t.name: t for t in read.tensors}
    seen: list[torch.Tensor] = []
    block = loaded.model.model.layers[1].self_attn.q_proj
    hook = block.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    with torch.no_grad():
        loaded.logits(torch.from_numpy(text.tokens))
    hook.remove()
    want = seen[0].flatten(0, 1).double().pow(2).sum(0)
    assert np.allclose(tensors["blk.1.attn_q.weight.in_sum2"].data, want, rtol=1e-4)
    assert tensors["blk.1.attn_q.weight.counts"].data.item() == 24
    experts = tensors["blk.0.ffn_down_exps.weight.counts"].data
    assert experts.shape == (4, 1)
    assert experts.sum() == 24 * index.top_k
    assert tensors["blk.0.ffn_gate_exps.weight.in_sum2"].data.shape == (4, 24)
