"""Which formats to solve with: those named, or under an engine those that were measured and that it stores as planned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitatlas.analysis.schema import FORMATS, NO_FORMAT, ModelIndex, UserError, expand_formats
from bitatlas.cache.store import Store

if TYPE_CHECKING:
    from bitatlas.app.targets import Target
    from bitatlas.app.targets.limits import Limits

__all__ = ["formats_to_solve"]

_DEFAULT = "int{2,3,4,5,6,8}-g64"
_LEAST = 2  # formats that a unit must have, or there is nothing to choose


def formats_to_solve(
    store: Store,
    index: ModelIndex,
    formats: str | tuple[str, ...] | None,
    target: str | None,
    metrics: Sequence[str],
    needs_damage: bool = True,
) -> tuple[tuple[str, ...], Limits | None]:
    """Names of the formats, and the limits of the engine if one is named.

    Args:
        formats: as the user named them; None = the default.
        metrics: damages that may be solved with; the first that was measured in enough formats of the engine decides.
        needs_damage: without, the formats need not have been measured.

    Raises:
        UserError: the engine takes none of the formats, or (None) too few that it takes were measured; says what to measure.
    """
    if target is None:
        return tuple(f.name for f in expand_formats(formats or _DEFAULT)), None
    from bitatlas.app.targets import get_target
    from bitatlas.app.targets.limits import limits_of, to_measure

    engine = get_target(target)
    own = to_measure(engine, index)
    if formats or not own:
        limits = limits_of(engine, index, tuple(f.name for f in expand_formats(formats or _DEFAULT)))
        return limits.formats, limits
    ideal = limits_of(engine, index, own)
    seen: list[str] = []
    for name in metrics:
        runs = [set(e.formats) for e in store.metrics_of(index.digest) if e.metric == name]
        if {NO_FORMAT} in runs:
            return ideal.formats, ideal
        # The engine's own grids first, then the run with the most of its formats, then the newest.
        runs.sort(
            key=lambda r: (-len(r & set(own)), -sum(engine.loads(FORMATS[f]) for f in r & FORMATS.keys()))
        )
        for run in runs:
            measured = [f for f in FORMATS if f in run]
            seen += [f for f in measured if f not in seen]
            for names in ([f for f in measured if engine.own(FORMATS[f])], measured):
                found = _enough(engine, index, tuple(names), ideal)
                if found is not None:
                    return found.formats, found
    if needs_damage:
        raise UserError(
            f"too few formats that {target} takes have been measured for {index.name}",
            found=f"{metrics[0] if len(metrics) == 1 else 'damage'} measured in: {', '.join(seen) or 'no format'}",
            fix=f"bitatlas measure {index.path} --metric {metrics[-1]} --formats {','.join(own)} --wait",
        )
    return ideal.formats, ideal


def _enough(engine: Target, index: ModelIndex, names: tuple[str, ...], ideal: Limits) -> Limits | None:
    """The limits among ``names``, if every unit that the engine could quantise has some of them to choose from."""
    from bitatlas.app.targets.limits import limits_of

    try:
        limits = limits_of(engine, index, names)
    except UserError:
        return None
    if not limits.pins.keys() <= ideal.pins.keys():
        return None
    real = [f for f in limits.formats if FORMATS[f].kind != "float"]
    choices = limits.mask(index, real).sum(axis=1)
    possible = ideal.mask(index, ideal.formats).sum(axis=1)
    short = [
        u for u, n, p in zip(index.units, choices, possible) if u.key not in ideal.pins and n < min(_LEAST, p)
    ]
    return None if short else limits
