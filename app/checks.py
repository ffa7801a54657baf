"""Numbers that are asked for, checked before anything is begun."""

from __future__ import annotations

from bitatlas.analysis.schema import UserError

__all__ = ["at_least", "check_new_tokens", "check_seed", "check_text_size"]

_SEEDS = 1 << 63  # what torch's generators take


def at_least(name: str, value: int, least: int) -> None:
    """``name`` may not be below ``least``.

    Raises:
        UserError: it is.
    """
    if value < least:
        raise UserError(f"the {name} must be at least {least}", found=str(value))


def check_new_tokens(count: int) -> None:
    """How much a model may be asked to say.

    Raises:
        UserError: nothing, or more than 4096 tokens.
    """
    if not 1 <= count <= 4096:
        raise UserError("the number of new tokens must be between 1 and 4096", found=str(count))


def check_text_size(tokens: int, seq_len: int) -> None:
    """Of one token nothing can be predicted.

    Raises:
        UserError: fewer than two tokens in all, or in a sequence.
    """
    at_least("number of tokens", tokens, 2)
    at_least("sequence length", seq_len, 2)


def check_seed(seed: int) -> None:
    """NumPy's and torch's generators take no negative seeds, and none of more than 63 bits.

    Raises:
        UserError: such a seed.
    """
    if not 0 <= seed < _SEEDS:
        raise UserError("the seed must be 0 or more", found=str(seed), fix="--seed 0")
