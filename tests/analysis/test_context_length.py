"""The longest sequence: learned tables end, rotations are stretched by their scaling, unknown is not a limit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitatlas.analysis.context_length import check_length, positions
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import KeptTensor, ModelIndex
from bitatlas.kernels.errors import UserError


@pytest.mark.parametrize(
    ("family", "learned"),
    [("gpt2", True), ("opt", True), ("llama", False), ("gemma3", False), ("gpt_neox", False)],
)  # fmt: skip
def test_real_configs(tiny_checkpoint, family, learned):
    index = index_model(tiny_checkpoint(family))
    assert index.learned_positions is learned
    assert index.positions == 256  # OPT's table holds two rows more, which are no positions
    assert ModelIndex.from_dict(index.to_dict()) == index


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({}, 0),
        ({"max_position_embeddings": "512"}, 0),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"max_position_embeddings": 131072,
          "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 131072),
        ({"max_position_embeddings": 32768, "rope_parameters": {
            "full_attention": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768},
            "sliding_attention": {"rope_type": "default"}}}, 131072),
        ({"max_position_embeddings": 512, "rope_scaling": {"factor": "many"}}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": {"factor": float("inf")}}, 512),
    ],
)  # fmt: skip
def test_rotary_configs(config, longest):
    assert positions(config, ()) == (longest, False)


def test_a_learned_table_counts_even_where_the_config_says_nothing_or_too_much():
    table = KeptTensor("transformer.wpe.weight", (256, 24), "F32", 0)
    assert positions({}, [table]) == (256, True)
    assert positions({"n_positions": 1024}, [table]) == (256, True)


def test_too_long_is_an_error_or_a_note(tiny_checkpoint):
    gpt2, llama = (index_model(tiny_checkpoint(name)) for name in ("gpt2", "llama"))
    assert check_length(gpt2, 256) == check_length(llama, 256) == ""
    with pytest.raises(UserError, match="table of positions") as raised:
        check_length(gpt2, 257)
    assert "257" in raised.value.found
    assert "256" in raised.value.fix
    assert "256 positions" in check_length(llama, 257)
    assert check_length(replace(llama, positions=0), 1 << 20) == ""
