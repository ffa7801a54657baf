"""Both ends of every matrix product of a pass: its input, and the gradient that arrives at its output.

No gradient of a weight is ever made: the graph begins at the first product that is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bitatlas.analysis.experts_hook import tap_experts
from bitatlas.analysis.unit_map import expert_modules

if TYPE_CHECKING:
    from bitatlas.analysis.loaded import LoadedModel

__all__ = ["OnInput", "OnOutput", "watch_products"]

OnInput = Callable[[Sequence[str], Tensor], None]
"""(units that share the product, x (n, cols)); token ids (n,) int64 for a lookup."""
OnOutput = Callable[[str, Tensor, bool], None]
"""(unit, gradient at its output (n, rows), whether it is a lookup: then (n, cols)); once for each backward pass."""


@contextmanager
def watch_products(
    loaded: LoadedModel, units: Sequence[str], on_input: OnInput, on_output: OnOutput
) -> Iterator[None]:
    """Report the products of these units during forwards and backwards inside the block. Gradients must be enabled."""
    wanted = set(units)
    ends: list[Callable[[], Any]] = []
    try:
        for module, keys in loaded._matmuls(wanted):
            ends.append(module.register_forward_hook(_linear_hook(loaded, keys, on_input, on_output)).remove)
        for module in loaded.model.modules():
            found = [
                k
                for k in wanted
                if isinstance(module, nn.Embedding) and loaded.handle(k).param is module.weight
            ]
            if found:
                ends.append(module.register_forward_hook(_lookup_hook(found[0], on_input, on_output)).remove)
        for layer, module in expert_modules(loaded.model).items():
            of = {(u.expert, u.role): u.key for u in loaded.index.units
                  if u.layer == layer and u.expert >= 0 and u.key in wanted}  # fmt: skip
            if of:
                ends.append(tap_experts(module, _expert_tap(loaded, of, on_input, on_output)))
        yield
    finally:
        for end in ends:
            end()


def _attached(y: Tensor) -> Tensor:
    """The same numbers with a graph; a copy, since a leaf must not be changed in place by what follows."""
    return y if y.requires_grad else y.detach().requires_grad_(True).clone()


def _rows_of(loaded: LoadedModel, key: str, delta: Tensor) -> Tensor:
    """The part of a product's gradient (n, all rows) that belongs to a unit; gate and up may share a parameter."""
    handle = loaded.handle(key)
    if not handle.half:
        return delta
    rows, first = handle.unit.rows, handle.half == "gate"
    if handle.interleaved:
        return delta[:, (0 if first else 1) :: 2]
    return delta[:, :rows] if first else delta[:, rows:]


def _linear_hook(
    loaded: LoadedModel, keys: list[str], on_input: OnInput, on_output: OnOutput
) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0].detach()
        on_input(keys, x.reshape(-1, x.shape[-1]))
        y = _attached(output)

        def arrived(g: Tensor) -> None:
            flat = g.detach().reshape(-1, g.shape[-1])
            for key in keys:
                on_output(key, _rows_of(loaded, key, flat), False)

        y.register_hook(arrived)
        return y

    return hook


def _lookup_hook(key: str, on_input: OnInput, on_output: OnOutput) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        on_input([key], args[0].detach().reshape(-1))
        y = _attached(output)
        y.register_hook(lambda g: on_output(key, g.detach().reshape(-1, g.shape[-1]), True))
        return y

    return hook


def _expert_tap(
    loaded: LoadedModel, of: dict[tuple[int, str], str], on_input: OnInput, on_output: OnOutput
) -> Callable[[int, str, Tensor, Tensor], Tensor]:
    def tap(expert: int, part: str, x: Tensor, y: Tensor) -> Tensor:
        roles = ("gate", "up") if part == "in" else ("down",)
        keys = [of[expert, r] for r in roles if (expert, r) in of]
        if not keys:
            return y
        on_input(keys, x.detach())
        y = _attached(y)

        def arrived(g: Tensor) -> None:
            for key in keys:
                on_output(key, _rows_of(loaded, key, g.detach()), False)

        y.register_hook(arrived)
        return y

    return tap
