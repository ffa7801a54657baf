"""From the user's words (bits, bytes, or memory to fit into) to a `Budget`."""

from __future__ import annotations

from collections.abc import Mapping

from bitatlas.analysis.schema import Budget, KvLayout, KvPair, ModelIndex, UserError, parse_pair
from bitatlas.app.checks import at_least
from bitatlas.app.sizes import format_bytes, format_least, parse_bytes
from bitatlas.solvers import Problem
from bitatlas.solvers.infeasible import check_feasible

__all__ = ["reserve_bytes", "resolve_budget", "too_small", "uniform_kv"]


def uniform_kv(index: ModelIndex, bits_k: float, bits_v: float) -> dict[int, KvPair]:
    """The same formats in every layer: keys by channel, values by token (KIVI); nothing at 16 bits.

    Raises:
        UserError: a width that the cache does not have.
    """
    if (bits_k, bits_v) == (16, 16) or index.kv is None:
        return {}
    names = ["kv16" if b == 16 else f"kv{b:g}-{axis}" for b, axis in ((bits_k, "channel"), (bits_v, "token"))]
    return dict.fromkeys(index.kv.layers, parse_pair("/".join(names)))


def reserve_bytes(text: str | int) -> int:
    """Bytes set aside; unlike every other size it may be 0.

    Raises:
        UserError: not a size.
    """
    return 0 if str(text).strip() == "0" else parse_bytes(text)


def resolve_budget(
    index: ModelIndex,
    *,
    bits: float | None = None,
    bytes_: str | int | None = None,
    fit: str | int | None = None,
    context: int = 0,
    batch: int = 1,
    reserve: str | int = "256MiB",
    bits_k: float = 16,
    bits_v: float = 16,
    kv: Mapping[int, KvPair] | None = None,
    smallest: int = 0,
) -> Budget:
    """The budget of exactly one of three questions.

    Args:
        index: the model.
        bits: effective bits per weight over the units (scales and zeros counted, kept tensors aside).
        bytes_: all weights, units and kept tensors.
        fit: memory for weights + KV cache at ``context`` tokens and ``batch`` sequences + ``reserve``.
        bits_k, bits_v: bits of one cached K and V element. kv: formats by layer, instead of these.
        smallest: bytes that all weights take at least, so that too little memory can be told what would do; 0 = not known.

    Raises:
        UserError: none or several of the three, a context without ``fit`` or a negative one, no sequence, or nothing is left for the weights.
    """
    at_least("context", context, 0)
    at_least("batch", batch, 1)
    if context and fit is None:
        raise UserError("a context length counts only where memory is shared with the KV cache", found=f"--context {context} without --fit",
                        fix="--fit 8GiB, or leave out --context")  # fmt: skip
    given = [
        name for name, value in (("--bits", bits), ("--bytes", bytes_), ("--fit", fit)) if value is not None
    ]
    if len(given) != 1:
        raise UserError(
            "one budget is needed",
            found=", ".join(given) or "none",
            fix="give one of --bits 3.5, --bytes 500MB, --fit 8GiB",
        )
    if bits is not None:
        if not 0 < bits <= 32:
            raise UserError("bits per weight must be between 0 and 32", found=str(bits))
        return Budget(int(bits * index.params / 8) + index.kept_bytes, label=f"{bits:g} bits per weight")
    if bytes_ is not None:
        count = parse_bytes(bytes_)
        return Budget(count, label=f"{format_bytes(count)} of weights")
    total, spare = parse_bytes(fit or 0), reserve_bytes(reserve)
    cached = 0
    if context:
        if index.kv is None:
            raise UserError(
                "the KV cache of this model cannot be computed",
                found="config.json does not give heads and head size",
                fix="use --bytes",
            )
        # Codes, scales and the 16-bit window: what the cache really takes.
        plan = uniform_kv(index, bits_k, bits_v) if kv is None else kv
        cached = index.kv.plan_bytes(plan, context, batch, KvLayout())
    left = total - cached - spare
    if left <= 0:
        taken = f"{format_bytes(cached)} of KV cache and {format_bytes(spare)} of reserve"
        least = format_least(smallest + cached + spare) if smallest else ""
        raise UserError(
            "nothing is left for the weights",
            found=f"{format_bytes(total)} less {taken}"
            + (f"; the smallest weights take {format_bytes(smallest)}" if smallest else ""),
            fix=(f"at least {least} in all, " if least else "more memory, ")
            + (
                "a shorter context, a smaller batch, fewer bits for K and V, or less reserve"
                if cached
                else "or less reserve"
            ),
        )
    label = f"{format_bytes(total)}, context {context}, batch {batch}" if context else format_bytes(total)
    return Budget(left, cached, spare, context, batch, label)


def too_small(problem: Problem, budget: Budget) -> UserError:
    """What to tell where no allocation fits: of memory shared with a cache and a reserve, also how much it has to be in all."""
    try:
        check_feasible(problem)
    except UserError as e:
        spare = budget.kv_bytes + budget.reserve_bytes
        if not spare:
            return e
        least = budget.total_bytes + problem.min_bytes - problem.limit_bytes
        taken = f"{format_bytes(budget.kv_bytes)} of KV cache and {format_bytes(budget.reserve_bytes)} of reserve are taken off before"
        other = e.fix.partition("a budget of at least")[0].rstrip(" ,").removesuffix("or").rstrip(" ,")
        fix = f"at least {format_least(least)} in all" + (f", or {other}" if other else "")
        return UserError(e.what, found=f"{e.found}; {taken}", fix=fix)
    raise AssertionError("it fits")
