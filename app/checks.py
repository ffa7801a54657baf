"""Numbers that are asked for, checked before anything is begun."""

from __future__ import annotations

from bitatlas.analysis.schema import UserError

__all__ = ["at_least", "check_seed"]

_SEEDS = 1 << 63  # what torch's generators take


def at_least(name: str, value: int, least: int) -> None:
    """``name`` may not be below ``least``.

    Raises:
        UserError: it is.
    """
    if value < least:
        raise UserError(f"the {name} must be at least {least}", found=str(value))


def check_seed(seed: int) -> None:
    """NumPy's and torch's generators take no negative seeds, and none of more than 63 bits.

    Raises:
        UserError: such a seed.
    """
    if not 0 <= seed < _SEEDS:
        raise UserError("the seed must be 0 or more", found=str(seed), fix="--seed 0")
