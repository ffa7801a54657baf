"""What a checkpoint is made of: units, kept tensors, ties, KV geometry, the index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bitatlas.kernels.formats import Format
from bitatlas.kernels.kv.formats import KV16, KvLayout, KvPair

__all__ = ["KeptTensor", "KvGeometry", "ModelIndex", "QuantUnit", "TieGroup"]


@dataclass(frozen=True, slots=True)
class QuantUnit:
    """The smallest thing that gets one format: a linear weight, or one projection of one expert.

    Attributes:
        key: the tensor's checkpoint name without ``.weight``; ``name[e]`` for an expert inside a fused 3-D
            tensor, ``name[e].gate`` / ``name[e].up`` where gate and up are fused too.
        role: ``q k v o qkv gate up down gate_up embed head router...``; shared experts ``shared_gate`` etc.
        layer: block index, -1 outside the blocks (embeddings, head).
        expert: expert index, or -1.
        rows, cols: output and input dimension; groups run along cols.
        tensor: checkpoint tensor that holds it.
        part: "" | "gate" | "up": which half of a fused gate_up tensor.
        transposed: the checkpoint stores (cols, rows) (GPT-2's Conv1D, gpt-oss experts).
        interleaved: gate and up rows alternate (gpt-oss) instead of gate first, up second.
    """

    key: str
    role: str
    layer: int
    expert: int
    rows: int
    cols: int
    tensor: str
    part: str = ""
    transposed: bool = False
    interleaved: bool = False

    @property
    def params(self) -> int:
        """Number of weights."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """A tensor that stays as it is: norms, biases, routers. ``nbytes`` counts against the budget."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class TieGroup:
    """Units that must share a format, with the reason (``"vLLM fuses q, k and v"``)."""

    name: str
    units: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """What one token costs in the KV cache.

    ``windows[l]`` is the sliding window of layer l in tokens, 0 for full attention; layers that keep no
    K/V of their own (linear attention, shared K/V) have ``heads[l] == 0``. ``v_dim`` is the size of a V head where it
    differs from K's ``head_dim`` (0 = the same); latent attention keeps its latent as K and the rotary key as V.
    """

    heads: tuple[int, ...]
    head_dim: int
    windows: tuple[int, ...]
    v_dim: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that keep K/V of their own."""
        return tuple(layer for layer, heads in enumerate(self.heads) if heads)

    def layer_bytes(self, layer: int, pair: KvPair, context: int, batch: int, layout: KvLayout) -> int:
        """Exact bytes of a layer's K and V in these formats: codes, scales, minima and the 16-bit window."""
        heads, window = self.heads[layer], self.windows[layer]
        k = layout.layer_bytes(pair.k, context, heads, self.head_dim, window)
        return batch * (k + layout.layer_bytes(pair.v, context, heads, self.v_dim or self.head_dim, window))

    def plan_bytes(self, plan: Mapping[int, KvPair], context: int, batch: int, layout: KvLayout) -> int:
        """Exact bytes of the whole cache; layers that the plan does not name keep 16 bits."""
        whole = KvPair(KV16, KV16)
        return sum(self.layer_bytes(i, plan.get(i, whole), context, batch, layout) for i in self.layers)

    def cache_bytes(self, context: int, batch: int, bits_k: float = 16, bits_v: float = 16) -> int:
        """Bytes at so many bits an element, scales not counted (`plan_bytes` counts them); sliding layers stop at their window."""
        total = 0.0
        for heads, window in zip(self.heads, self.windows):
            tokens = min(context, window) if window else context
            bits = self.head_dim * bits_k + (self.v_dim or self.head_dim) * bits_v
            total += batch * tokens * heads * bits / 8
        return int(-(-total // 1))


@dataclass(frozen=True)
class ModelIndex:
    """Units of a checkpoint, from its headers alone.

    Attributes:
        path: the checkpoint's folder or GGUF file, absolute.
        digest: content key (sampled; see `analysis.model_index.model_digest`).
        name: folder name, for people.
        architecture, model_type: from config.json.
        units: in layer order; the order is the units' integer id everywhere.
        kept: tensors that stay as they are.
        n_layers, n_experts (routed experts per MoE layer, 0 for dense), top_k.
        kv: KV-cache geometry, None when the config does not say.
        vocab_size: rows of the embedding, 0 when unknown.
        source: ``safetensors`` or ``gguf``.
        notes: remarks for people ("head is tied to the embedding").
        positions: the longest sequence it was made for, 0 when unknown; learned_positions: there is no position beyond.
    """

    path: str
    digest: str
    name: str
    architecture: str
    model_type: str
    units: tuple[QuantUnit, ...]
    kept: tuple[KeptTensor, ...]
    n_layers: int
    n_experts: int
    top_k: int
    kv: KvGeometry | None
    vocab_size: int = 0
    source: str = "safetensors"
    notes: tuple[str, ...] = ()
    positions: int = 0
    learned_positions: bool = False

    @cached_property  # pages ask for it at every turn, and there may be a hundred thousand units
    def params(self) -> int:
        """Quantisable weights."""
        return sum(u.params for u in self.units)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the tensors that stay as they are."""
        return sum(t.nbytes for t in self.kept)

    def unit_keys(self) -> tuple[str, ...]:
        """All unit keys, in order."""
        return tuple(u.key for u in self.units)

    def bytes_table(self, formats: Sequence[Format]) -> np.ndarray:
        """(units, formats) int64: exact payload bytes of every unit in every format."""
        # Thousands of experts share a shape; count each shape once.
        memo: dict[tuple[int, int], list[int]] = {}
        out = np.empty((len(self.units), len(formats)), np.int64)
        for i, u in enumerate(self.units):
            shape = (u.rows, u.cols)
            if shape not in memo:
                memo[shape] = [f.payload_bytes(*shape) for f in formats]
            out[i] = memo[shape]
        return out

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form (units as rows)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelIndex:
        """Inverse of `to_dict`."""
        d = dict(data)
        d["units"] = tuple(QuantUnit(**u) for u in d["units"])
        d["kept"] = tuple(
            KeptTensor(k["name"], tuple(k["shape"]), k["dtype"], k["nbytes"]) for k in d["kept"]
        )
        kv = d.get("kv")
        d["kv"] = (
            KvGeometry(tuple(kv["heads"]), kv["head_dim"], tuple(kv["windows"]), kv.get("v_dim", 0))
            if kv
            else None
        )
        d["notes"] = tuple(d.get("notes", ()))
        return cls(**d)
