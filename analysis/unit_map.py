"""Where each unit lives in a loaded transformers model: names on disk to views of parameters in memory.

transformers 5 fuses the experts of a layer into 3-D parameters that no module of its own holds; the checkpoint
usually stores them one by one. (layer, expert, gate | up | down) is the same on both sides and joins them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitatlas.analysis.families import bare_name, layer_of
from bitatlas.analysis.schema import ModelIndex, QuantUnit
from bitatlas.kernels.errors import UserError

__all__ = ["UnitHandle", "expert_modules", "map_units"]


@dataclass(frozen=True, slots=True)
class UnitHandle:
    """A unit inside a loaded model. All views share memory with the parameter.

    Attributes:
        unit: the unit.
        param: the parameter that holds it, maybe together with other units.
        expert: index along the first dimension of a 3-D parameter, -1 for a 2-D one.
        transposed: the parameter is (.., cols, rows).
        half: "" | "gate" | "up": which half of the rows; interleaved: even and odd rows instead.
    """

    unit: QuantUnit
    param: nn.Parameter
    expert: int = -1
    transposed: bool = False
    half: str = ""
    interleaved: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """The unit's (rows, cols) view of a tensor shaped like the parameter."""
        if self.expert >= 0:
            tensor = tensor[self.expert]
        if self.transposed:
            tensor = tensor.T
        if self.half:
            first = self.half == "gate"
            rows = self.unit.rows
            if self.interleaved:
                tensor = tensor[0 if first else 1 :: 2]
            else:
                tensor = tensor[:rows] if first else tensor[rows:]
        return tensor

    def get(self) -> Tensor:
        """(rows, cols) view of the weight; writing into it changes the model."""
        return self.view(self.param.detach())

    def set(self, weight: Tensor) -> None:
        """Copy a (rows, cols) matrix into the model.

        Raises:
            ValueError: another shape.
        """
        target = self.get()
        if weight.shape != target.shape:
            raise ValueError(f"{self.unit.key} is {tuple(target.shape)}, not {tuple(weight.shape)}")
        with torch.no_grad():
            target.copy_(weight)

    def exchange(self, weight: Tensor) -> Tensor:
        """Put a (rows, cols) matrix in the unit's place; returns what was there.

        A unit that is a parameter of its own swaps pointers: nothing is copied, and until it is exchanged back
        the model reads ``weight`` itself. A part of a parameter is copied.

        Raises:
            ValueError: another shape.
        """
        param = self.param
        own = self.expert < 0 and not self.transposed and not self.half and weight.is_contiguous()
        if own and (weight.shape, weight.dtype, weight.device) == (param.shape, param.dtype, param.device):
            before = param.data
            param.data = weight.detach()
            return before
        before = self.get().clone()
        self.set(weight)
        return before

    def grad(self) -> Tensor | None:
        """(rows, cols) view of the gradient, None when there is none."""
        return None if self.param.grad is None else self.view(self.param.grad)


def expert_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Layer -> module that holds the fused 3-D expert parameters."""
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Parameter) and down.dim() == 3:
            found[layer_of(name)] = module
    return found


def map_units(index: ModelIndex, model: nn.Module) -> dict[str, UnitHandle]:
    """Handle of every unit.

    Raises:
        UserError: a unit is not in the model, or has another shape there.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    owners = {f"{n}.weight" if n else "weight": m for n, m in model.named_modules()}
    bare: dict[str, str] = {}
    for name in params:
        # Two parameters with one bare name (a second decoder) can only be found by their full names.
        bare[bare_name(name)] = "" if bare_name(name) in bare else name
    experts = expert_modules(model)
    handles = {}
    for unit in index.units:
        handle = _in_experts(unit, experts, index) if unit.expert >= 0 else None
        handle = handle or _by_name(unit, params, bare, owners) or _by_role(unit, model)
        if handle is None or tuple(handle.get().shape) != (unit.rows, unit.cols):
            shape = "nothing" if handle is None else f"a matrix {tuple(handle.get().shape)}"
            raise UserError(
                f"the unit {unit.key} of the checkpoint has no place in the loaded {type(model).__name__}",
                found=f"{shape}, expected ({unit.rows}, {unit.cols})",
                fix="metrics that need weights only still work; please report this architecture",
            )
        handles[unit.key] = handle
    return handles


def _by_name(
    unit: QuantUnit,
    params: Mapping[str, nn.Parameter],
    bare: Mapping[str, str],
    owners: Mapping[str, nn.Module],
) -> UnitHandle | None:
    """A 2-D parameter of the same name, wrapper prefixes aside; else a half of a fused gate_up of its parent."""
    name = unit.tensor if unit.tensor in params else bare.get(bare_name(unit.tensor), "")
    if name and params[name].dim() == 2:
        # Conv1D of GPT-2 keeps (in, out); it is the only 2-D layout that differs from nn.Linear.
        conv1d = type(owners.get(name)).__name__ == "Conv1D"
        return UnitHandle(unit, params[name], transposed=conv1d)
    stem, _, leaf = unit.tensor.removesuffix(".weight").rpartition(".")
    fused = bare.get(bare_name(f"{stem}.gate_up_proj.weight"), "")
    if fused and leaf in ("gate_proj", "up_proj") and params[fused].dim() == 2:
        return UnitHandle(unit, params[fused], half=leaf.removesuffix("_proj"))
    return None


def _by_role(unit: QuantUnit, model: nn.Module) -> UnitHandle | None:
    """The model's own embedding or head, when the checkpoint calls it differently (GPT-NeoX's embed_out)."""
    getter = {"embed": "get_input_embeddings", "head": "get_output_embeddings"}.get(unit.role, "")
    module = getattr(model, getter)() if hasattr(model, getter) else None
    weight = getattr(module, "weight", None)
    return UnitHandle(unit, weight) if isinstance(weight, nn.Parameter) else None


def _in_experts(unit: QuantUnit, experts: Mapping[int, nn.Module], index: ModelIndex) -> UnitHandle | None:
    """A slice of the layer's fused expert parameters."""
    module = experts.get(unit.layer)
    if module is None or unit.role not in ("gate", "up", "down"):
        return None
    # Llama 4's experts carry no layout flags; they are (experts, in, out).
    transposed = bool(getattr(module, "is_transposed", index.model_type.startswith("llama4")))
    if unit.role == "down":
        return UnitHandle(unit, module.down_proj, unit.expert, transposed)  # type: ignore[arg-type]
    fused = getattr(module, "gate_up_proj", None)
    if isinstance(fused, nn.Parameter):
        interleaved = not getattr(module, "is_concatenated", True)
        interleaved = interleaved or index.model_type == "gpt_oss"
        return UnitHandle(unit, fused, unit.expert, transposed, unit.role, interleaved)
    alone = getattr(module, f"{unit.role}_proj", None)
    return UnitHandle(unit, alone, unit.expert, transposed) if isinstance(alone, nn.Parameter) else None
