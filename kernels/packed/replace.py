"""Puts packed modules where dense ones were: linears, Conv1D, embeddings, fused experts, and what is tied to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.packed.manifest import PackedUnit
from bitatlas.kernels.packed.matrix import PackedMatrix
from bitatlas.kernels.packed.modules import ExpertStack, PackedEmbedding, PackedExperts, PackedLinear
from bitatlas.kernels.packed.places import Place, Places

__all__ = ["Replacer", "tie"]

_UP = ("gate_up_proj", "up_proj")
Stack = dict[int, dict[str, PackedMatrix]]  # expert -> part -> matrix


class Replacer:
    """Collects packed matrices and replaces the modules that held them.

    Use: `sort` the units (what it gives back has to be loaded dense), `add` each of ``units``, then `finish`.
    """

    def __init__(self, model: nn.Module, places: Places, dtype: torch.dtype) -> None:
        self.model, self.places, self.dtype = model, places, dtype
        self.units: list[PackedUnit] = []
        self._place: dict[str, Place] = {}
        self._stacks: dict[str, dict[str, Stack]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(dict))
        )

    def sort(self, units: Iterable[PackedUnit]) -> dict[str, list[PackedUnit]]:
        """Keep the units that can stay packed; return the others by checkpoint tensor."""
        dense: dict[str, list[PackedUnit]] = defaultdict(list)
        experts: dict[str, list[PackedUnit]] = defaultdict(list)
        for unit in units:
            place = self.places.find(unit.tensor)
            if place is None or not place.direct:
                dense[unit.tensor].append(unit)
                continue
            self._place[unit.key] = place
            module = self.model.get_submodule(place.module)
            if _is_experts(module):
                experts[place.module].append(unit)
            elif _packable(module) and place.param == "weight" and not place.stacked:
                self.units.append(unit)
            else:
                dense[unit.tensor].append(unit)
        for path, members in experts.items():
            # A layer with an expert missing from the units cannot be replaced as a whole.
            if self._complete(self.model.get_submodule(path), members):
                self.units += members
            else:
                for unit in members:
                    dense[unit.tensor].append(unit)
        return dict(dense)

    def _complete(self, module: nn.Module, members: list[PackedUnit]) -> bool:
        have: dict[str, set[tuple[int, str]]] = defaultdict(set)
        for u in members:
            place = self._place[u.key]
            have[place.param].add((u.expert, place.part or u.part))
        names = [n for n in (*_UP, "down_proj") if isinstance(getattr(module, n, None), nn.Parameter)]
        count: int = module.num_experts  # type: ignore[assignment]
        return all(
            {e for e, _ in have[n]} == set(range(count)) and len(have[n]) % count == 0 for n in names
        ) and len(have) == len(names)

    def add(self, unit: PackedUnit, matrix: PackedMatrix) -> None:
        """Put one matrix in its place; experts wait for `finish`.

        Raises:
            UserError: the module has another shape.
        """
        place = self._place[unit.key]
        module = self.model.get_submodule(place.module)
        if _is_experts(module):
            self._stacks[place.module][place.param][unit.expert][place.part or unit.part] = matrix
            return
        bias = getattr(module, "bias", None)
        shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        if shape != ((unit.cols, unit.rows) if isinstance(module, Conv1D) else (unit.rows, unit.cols)):
            raise UserError(
                f"{unit.key} does not fit the model", found=f"({unit.rows}, {unit.cols}), {shape} expected"
            )
        packed: nn.Module
        if isinstance(module, nn.Embedding):
            packed = PackedEmbedding(matrix, self.dtype, _scale(module))
        else:
            packed = PackedLinear(matrix, bias)
        self.model.set_submodule(place.module, packed)

    def finish(self) -> None:
        """Replace the experts modules."""
        for path, stacks in self._stacks.items():
            shell = self.model.get_submodule(path)
            up_name = next(n for n in _UP if n in stacks)
            interleaved = not getattr(shell, "is_concatenated", True)
            up, down = (
                ExpertStack(
                    {e: dict(sorted(parts.items())) for e, parts in stacks[n].items()},
                    getattr(shell, f"{n}_bias", None),
                    interleaved,
                )
                for n in (up_name, "down_proj")
            )
            for name in (up_name, "down_proj", f"{up_name}_bias", "down_proj_bias"):
                shell._parameters.pop(name, None)
            self.model.set_submodule(path, PackedExperts(shell, up, down))


def _is_experts(module: nn.Module) -> bool:
    """The experts modules that transformers' own generic forward can run, hence ours too."""
    return (
        hasattr(module, "_apply_gate") and hasattr(module, "is_concatenated") and hasattr(module, "down_proj")
    )


def _packable(module: nn.Module) -> bool:
    """Modules whose forward is the plain one; a subclass that changes it is left dense."""
    if isinstance(module, Conv1D):
        return True
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward or _scale(module) is not None
    return False


def _scale(module: nn.Module) -> Tensor | None:
    """Factor on an embedding's output: a buffer in Gemma, a number in others."""
    scale = getattr(module, "embed_scale", None)
    return torch.tensor(float(scale)) if isinstance(scale, (int, float)) else scale


def tie(model: nn.Module, tied: dict[str, str]) -> None:
    """Share one packed matrix (or parameter) between ``target: source`` names where only one of them was stored."""
    for target, source in tied.items():
        for to, of in ((target, source), (source, target)):
            if _present(model, of) and not _present(model, to):
                _share(model, to, of)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _present(model: nn.Module, name: str) -> bool:
    module, leaf = _owner(model, name)
    if isinstance(module, (PackedLinear, PackedEmbedding)) and leaf == "weight":
        return True
    value = getattr(module, leaf, None)
    return isinstance(value, Tensor) and not value.is_meta


def _share(model: nn.Module, to: str, of: str) -> None:
    (target, leaf), (source, _) = _owner(model, to), _owner(model, of)
    if not isinstance(source, (PackedLinear, PackedEmbedding)) or leaf != "weight":
        setattr(target, leaf, getattr(source, of.rpartition(".")[2]))
        return
    path = to.rpartition(".")[0]
    if isinstance(target, nn.Embedding):
        dtype = target.weight.dtype
        model.set_submodule(path, PackedEmbedding(source.matrix, dtype, _scale(target)))
    else:
        model.set_submodule(path, PackedLinear(source.matrix, getattr(target, "bias", None)))
