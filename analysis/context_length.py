"""How long a sequence a model can read, from its config and its position table alone. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bitatlas.analysis.schema import KeptTensor, ModelIndex
from bitatlas.kernels.errors import UserError

__all__ = ["check_length", "positions"]

_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")


def positions(config: Mapping[str, Any], kept: Iterable[KeptTensor]) -> tuple[int, bool]:
    """Positions that the model knows, and whether they are learned: a table that ends, not a rotation that goes on.

    Rotary positions reach as far as the config says, or as its scaling stretches what it was trained on.

    Returns:
        (0, False) where nothing says so.
    """
    said = next((n for name in _NAMES if (n := _count(config.get(name)))), 0)
    for tensor in kept:
        if len(tensor.shape) == 2 and tensor.name.removesuffix(".weight").rpartition(".")[2] in _TABLES:
            # OPT keeps two more rows than positions; a config that claims more rows than there are is wrong.
            return min(said or tensor.shape[0], tensor.shape[0]), True
    return max(said, *(_stretched(rope, said) for rope in _scalings(config)), 0), False


def check_length(index: ModelIndex, seq_len: int) -> str:
    """What there is to say about sequences of so many tokens, "" when nothing.

    Raises:
        UserError: the model has no position for the last of them.
    """
    if not index.positions or seq_len <= index.positions:
        return ""
    if index.learned_positions:
        raise UserError(
            "the sequences are longer than the model's table of positions",
            found=f"{seq_len} tokens a sequence, {index.name} has {index.positions} learned positions",
            fix=f"at most {index.positions} tokens a sequence",
        )
    return (
        f"{seq_len} tokens a sequence are more than the {index.positions} positions that {index.name} was made for: "
        f"what is measured there says little about its use"
    )


def _scalings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rotary scalings of the config; Gemma has one for each kind of layer."""
    found = [config.get(name) for name in ("rope_scaling", "rope_parameters")]
    found += [inner for rope in found if isinstance(rope, dict) for inner in rope.values()]
    return [rope for rope in found if isinstance(rope, dict)]


def _stretched(rope: Mapping[str, Any], said: int) -> int:
    """Positions after scaling by a factor; the config may or may not have counted it in."""
    factor, trained = rope.get("factor"), _count(rope.get("original_max_position_embeddings"))
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 1 <= factor <= 1 << 16:
        return 0
    return int(factor * (trained or said))


def _count(value: Any) -> int:
    sensible = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31
    return value if sensible else 0
