"""Where a checkpoint tensor lives in a transformers model: transformers' own name mapping, read backwards from loading.

transformers 5 keeps all experts of a layer in one 3-D parameter and renames on load; its mapping of checkpoint
names to parameters is asked here, so that every architecture it loads has its places, without a table of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

__all__ = ["Place", "Places"]


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the model.

    Attributes:
        module: path of the module that owns the parameter; param: the parameter's name there.
        stacked: the tensor is one of many in a 3-D parameter (one expert).
        part: "gate" | "up" when two tensors share each slice, else "".
        direct: the parameter holds the tensor as it is (or its slice); otherwise only transformers can convert it.
    """

    module: str
    param: str
    stacked: bool = False
    part: str = ""
    direct: bool = True


class Places:
    """The places of a model that may still be on the meta device."""

    def __init__(self, model: nn.Module) -> None:
        self.mapping = get_model_conversion_mapping(model)
        self._renamings = [m for m in self.mapping if isinstance(m, WeightRenaming)]
        self._converters = [m for m in self.mapping if isinstance(m, WeightConverter)]
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()

    def find(self, tensor: str) -> Place | None:
        """The place of the checkpoint tensor ``tensor``, None when the model has none for it."""
        name, pattern = rename_source_key(
            tensor, self._renamings, self._converters, self._prefix, self._state
        )
        if name not in self._state and tensor in self._state:
            name, pattern = tensor, None
        if name not in self._state:
            return None
        module, _, param = name.rpartition(".")
        if pattern is None:
            return Place(module, param)
        converter = self._by_pattern[pattern]
        kinds = [type(op) for op in converter.operations]
        sources = converter.source_patterns
        if kinds == [MergeModulelist] and len(sources) == 1:
            return Place(module, param, stacked=True)
        if kinds == [MergeModulelist, Concatenate] and len(sources) == 2:
            # Concatenated in the order of the patterns: gate rows, then up rows.
            return Place(module, param, stacked=True, part=("gate", "up")[sources.index(pattern)])
        return Place(module, param, direct=False)
