from __future__ import annotations

import re

import gguf
import pytest

from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import FORMATS
from bitatlas.app.targets import REJECTED, SERVABLE, TARGETS
from bitatlas.app.targets.ggml import ARCHITECTURES, BLOCKS, exact_type, fallback, gguf_name, tensor_bytes

TARGET = TARGETS["llama.cpp"]
KNOWN = ("llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe",
         "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")  # fmt: skip


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for name, size in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] == size
    assert all(hasattr(gguf.MODEL_ARCH, a) for a in ARCHITECTURES.values())


@pytest.mark.parametrize("family", KNOWN)
def test_names_are_those_of_the_gguf_package(family: str, tiny_checkpoint) -> None:
    index = index_model(tiny_checkpoint(family))
    arch = gguf.MODEL_ARCH[ARCHITECTURES[index.model_type]]
    names = gguf.get_tensor_name_map(arch, index.n_layers)
    compared = 0
    for unit in index.units:
        key = re.sub(r"\.experts\.\d+\.", ".experts.", unit.key)
        key = re.sub(r"\[\d+\](\.\w+)?$", "", key).replace("gate_up_proj", f"{unit.role}_proj")
        known = names.get_name(key)
        if known:
            assert gguf_name(unit) == known, unit.key
            compared += 1
    assert compared >= 0.7 * len(index.units)


@pytest.mark.parametrize(
    ("kind", "cols", "got"),
    [("q4_k", 512, "q4_k"), ("q2_k", 576, "q4_0"), ("q3_k", 576, "q4_0"), ("q4_k", 576, "q5_0"), ("q5_k", 576, "q5_1"),
     ("q6_k", 576, "q8_0"), ("q8_0", 576, "q8_0"), ("q8_0", 40, "f16"), ("q4_k", 40, "f16"), ("bf16", 40, "bf16")],
)  # fmt: skip
def test_fallbacks_of_llama_quantize(kind: str, cols: int, got: str) -> None:
    assert fallback(kind, cols) == got


def test_golden_file(make_index, allocate) -> None:
    index = make_index("qwen3_moe", layers=1, experts=2)
    formats = {"q": "int8-g32-sym", "k": "int5-g64", "v": "int6-g64", "o": "int4-g32-sym", "gate": "int3-g64",
               "up": "int3-g64", "down": "int2-g128", "embed": "int8-g64", "head": "int6-g64"}  # fmt: skip
    plan = allocate(index, {u.key: formats[u.role] for u in index.units})
    assert TARGET.check(plan, index).status == SERVABLE
    files = TARGET.render(plan, index)
    assert files["tensor-types.txt"] == (
        "^token_embd\\.weight$=q8_0\n"
        "^blk\\.0\\.attn_q\\.weight$=q8_0\n"
        "^blk\\.0\\.attn_k\\.weight$=q5_k\n"
        "^blk\\.0\\.attn_v\\.weight$=q6_k\n"
        "^blk\\.0\\.attn_output\\.weight$=q4_0\n"
        "^blk\\.0\\.ffn_gate_exps\\.weight$=q3_k\n"
        "^blk\\.0\\.ffn_up_exps\\.weight$=q3_k\n"
        "^blk\\.0\\.ffn_down_exps\\.weight$=q2_k\n"
        "^output\\.weight$=q6_k\n"
    )
    assert "--token-embedding-type q8_0 --output-tensor-type q6_k" in files["run.sh"]
    assert files["run.sh"].rstrip().endswith("Q4_K_M")  # a base that no tensor uses


def test_every_pattern_matches_one_tensor_and_is_lower_case(make_index, allocate) -> None:
    index = make_index("qwen3_moe", layers=12, experts=2)
    plan = allocate(index, "int4-g64")
    text = TARGET.render(plan, index)["tensor-types.txt"]
    assert text == text.lower()
    names = {gguf_name(u) + ".weight" for u in index.units}
    for line in text.split():
        pattern, _, _ = line.rpartition("=")
        assert len([n for n in names if re.search(pattern, n)]) == 1


def test_size_is_counted_tensor_by_tensor(make_index, allocate) -> None:
    index = make_index("llama", layers=1)
    plan = allocate(index, "int4-g64")
    linears = sum(u.params for u in index.units if u.layer >= 0)
    norms = sum(k.nbytes * 2 for k in index.kept)  # bf16 norms become float32
    assert TARGET.engine_bytes(plan, index) == linears // 256 * 144 + 2 * 1000 * 256 * 2 + norms
    assert tensor_bytes("q4_k", 512) == 288


def test_experts_of_a_projection_share_a_type_and_projections_need_not(make_index, allocate) -> None:
    index = make_index("qwen3_moe", experts=4)
    formats = {u.key: "int4-g64" if u.role == "down" else "int3-g64" for u in index.units}
    assert TARGET.check(allocate(index, formats), index).status == SERVABLE
    odd = next(u.key for u in index.units if u.expert == 2)
    verdict = TARGET.check(allocate(index, formats | {odd: "int8-g64"}), index)
    assert verdict.status != SERVABLE
    assert verdict.changes == {odd: "int3-g64"}


def test_rows_that_are_no_whole_blocks_are_said(tiny_checkpoint, allocate) -> None:
    index = index_model(tiny_checkpoint("llama"))
    verdict = TARGET.check(allocate(index, "int4-g64"), index)
    assert any("fall back" in n for n in verdict.notes)


def test_mxfp4_is_a_type_and_other_tables_are_none(make_index, allocate) -> None:
    index = make_index("llama", layers=1)
    verdict = TARGET.check(allocate(index, "mxfp4"), index)
    assert verdict.status == SERVABLE
    assert (
        "^blk\\.0\\.attn_q\\.weight$=mxfp4"
        in TARGET.render(allocate(index, "mxfp4"), index)["tensor-types.txt"]
    )
    q = next(u for u in index.units if u.role == "q")
    assert (
        TARGET.unit_bytes(q, FORMATS["mxfp4"])
        == q.params // 32 * 17
        == FORMATS["mxfp4"].payload_bytes(q.rows, q.cols)
    )
    for name in ("nf4-g32", "fp4-g32", "fp8-channel", "int3-g64-o1"):
        assert TARGET.check(allocate(index, name), index).status == REJECTED
        assert exact_type(FORMATS[name]) == ""
