"""Scale folding: a per-channel scale moved from a layer's weights into what comes before it, the function unchanged.

A consumer's input columns are multiplied by s, its producer's outputs divided by s. Producers: the norm before q, k, v or
before gate and up (and the router, which then is a consumer too); v before o; up before down. Names propose the
places, the model confirms them: each kind is tried with random powers of two, which floating point carries exactly, and a
kind after which the logits differ is dropped. So an unknown architecture gets fewer folds, never a wrong model.

Norm weights keep their dtype: 1 / s is rounded first and s is taken from what was stored. Other tensors that change
(routers, biases) are stored as float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bitatlas.analysis.families import layer_of
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.schema import ModelIndex, QuantUnit
from bitatlas.kernels.packed.shards import ShardReader, TensorSpec, write_shard

__all__ = [
    "Fold",
    "Folding",
    "confirmed",
    "exact_scale",
    "find_folds",
    "folded",
    "read_scales",
    "widened",
    "write_scales",
]

_ATTENTION_NORMS = ("input_layernorm", "ln_1", "attention_norm", "self_attn_layer_norm")
_MLP_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "ffn_norm", "final_layer_norm")
_ATTENTION = frozenset(("q", "k", "v", "qkv", "q_a", "kv_a"))
_MLP = frozenset(("gate", "up", "gate_up", "fc1", "shared_gate", "shared_up", "shared_gate_up"))
_CHAINS = (("up", "down"), ("shared_up", "shared_down"), ("fc1", "fc2"))
_TOLERANCE = 1e-4  # of the largest logit


@dataclass(frozen=True, slots=True)
class Fold:
    """A place for a scale.

    Attributes:
        name: kind and place, unique.
        kind: ``attention``, ``mlp`` (from a norm), ``value``, ``up``...: what is confirmed together.
        size: channels of the scale.
        consumers: units whose columns are multiplied.
        producer: unit whose rows are divided, "" for a norm.
        gamma: the norm's weight, "" where a unit produces.
        kept: other kept tensors that are divided (biases); kept_in: kept tensors whose columns are multiplied (routers).
        repeat, head: consumers see every head of ``head`` channels ``repeat`` times in a row (grouped-query attention).
        offset: the norm multiplies by (weight + offset); 1 in Gemma.
    """

    name: str
    kind: str
    size: int
    consumers: tuple[str, ...]
    producer: str = ""
    gamma: str = ""
    kept: tuple[str, ...] = ()
    kept_in: tuple[str, ...] = ()
    repeat: int = 1
    head: int = 0
    offset: float = 0.0

    def spread(self, scale: Tensor) -> Tensor:
        """(size,) per channel -> (cols,) per input column of the consumers."""
        if self.repeat == 1:
            return scale
        return scale.view(-1, 1, self.head).expand(-1, self.repeat, -1).reshape(-1)

    def gathered(self, columns: Tensor) -> Tensor:
        """(cols,) -> (size,): the mean over the columns that a channel feeds."""
        return columns if self.repeat == 1 else columns.view(-1, self.repeat, self.head).mean(1).reshape(-1)


def find_folds(index: ModelIndex) -> list[Fold]:
    """Places that the names suggest, in the order of the layers."""
    shapes = {k.name: k.shape for k in index.kept}
    by_layer: dict[int, list[QuantUnit]] = {}
    for u in index.units:
        by_layer.setdefault(u.layer, []).append(u)
    kept: dict[int, list[str]] = {}
    for name in shapes:
        kept.setdefault(layer_of(name), []).append(name)
    out: list[Fold] = []
    for layer in sorted(n for n in by_layer if n >= 0):
        units, names = by_layer[layer], kept.get(layer, [])
        for kind, leaves, roles in (("attention", _ATTENTION_NORMS, _ATTENTION), ("mlp", _MLP_NORMS, _MLP)):
            fold = _norm_fold(kind, leaves, [u for u in units if u.role in roles], names, shapes, layer)
            out += [fold] if fold else []
        out += _value_fold(units, index, shapes)
        for first, second in _CHAINS:
            downs = {u.expert: u for u in units if u.role == second}
            for up in (u for u in units if u.role == first and u.expert in downs):
                if up.rows == downs[up.expert].cols:
                    out.append(_chain(first, up, downs[up.expert], shapes))
    return out


def _norm_fold(
    kind: str, leaves: Sequence[str], units: list[QuantUnit], names: list[str],
    shapes: Mapping[str, tuple[int, ...]], layer: int,
) -> Fold | None:  # fmt: skip
    gamma = next((n for leaf in leaves for n in names if n.endswith(f".{leaf}.weight")), "")
    if not gamma or not units or any((u.cols,) != shapes[gamma] for u in units):
        return None
    size = shapes[gamma][0]
    bias = gamma.removesuffix("weight") + "bias"
    routers = (
        tuple(n for n in names if len(shapes[n]) == 2 and shapes[n][-1] == size) if kind == "mlp" else ()
    )
    return Fold(f"{kind} of layer {layer}", kind, size, tuple(u.key for u in units), gamma=gamma,
                kept=(bias,) if bias in shapes else (), kept_in=routers)  # fmt: skip


def _value_fold(
    units: list[QuantUnit], index: ModelIndex, shapes: Mapping[str, tuple[int, ...]]
) -> list[Fold]:
    v, o = ([u for u in units if u.role == role] for role in ("v", "o"))
    if (
        len(v) != 1
        or len(o) != 1
        or index.kv is None
        or o[0].cols % v[0].rows
        or v[0].rows % index.kv.head_dim
    ):
        return []
    return [
        replace(_chain("value", v[0], o[0], shapes), repeat=o[0].cols // v[0].rows, head=index.kv.head_dim)
    ]


def _chain(
    kind: str, producer: QuantUnit, consumer: QuantUnit, shapes: Mapping[str, tuple[int, ...]]
) -> Fold:
    bias = producer.tensor.removesuffix("weight") + "bias"
    return Fold(f"{kind} {producer.key}", kind, producer.rows, (consumer.key,), producer.key,
                kept=(bias,) if shapes.get(bias) == (producer.rows,) else ())  # fmt: skip


def widened(folds: Iterable[Fold]) -> frozenset[str]:
    """Kept tensors that are stored as float32 where these folds may change them."""
    return frozenset(n for f in folds for n in (*f.kept, *f.kept_in))


class Folding:
    """Folds with their scales: what becomes of units and kept tensors. Without folds, nothing changes.

    Args:
        scales: (fold, (size,) float32 positive); at most one fold may produce, and one consume, at each unit.
    """

    def __init__(self, scales: Iterable[tuple[Fold, Tensor]] = ()) -> None:
        self.scales = {f.name: (f, s.float()) for f, s in scales}
        self._columns: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self._kept: dict[str, tuple[Fold, Tensor]] = {}
        for f, s in self.scales.values():
            self._columns |= dict.fromkeys(f.consumers, f.spread(s))
            self._rows |= {f.producer: s} if f.producer else {}
            self._kept |= dict.fromkeys((n for n in (f.gamma, *f.kept, *f.kept_in) if n), (f, s))

    def touches(self, unit: str) -> bool:
        """Whether the unit's weight is stored scaled."""
        return unit in self._columns or unit in self._rows

    def columns(self, unit: str) -> Tensor | None:
        """(cols,) the factor on the unit's input columns, None for 1."""
        return self._columns.get(unit)

    def apply(self, unit: str, weight: Tensor) -> Tensor:
        """(rows, cols) as stored; ``weight`` itself is not changed."""
        return self._scaled(weight, self._columns.get(unit), self._rows.get(unit))

    def undo(self, unit: str, weight: Tensor) -> Tensor:
        """Inverse of `apply`: the stored weight as the original model would need it."""
        inverse = [None if s is None else 1 / s for s in (self._columns.get(unit), self._rows.get(unit))]
        return self._scaled(weight, *inverse)

    @staticmethod
    def _scaled(weight: Tensor, columns: Tensor | None, rows: Tensor | None) -> Tensor:
        if columns is not None:
            weight = weight * columns.to(weight.device)
        return weight if rows is None else weight / rows.to(weight.device).unsqueeze(1)

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        """A kept tensor as stored: norm weights in their own dtype, others that change in float32."""
        if name not in self._kept:
            return tensor
        fold, s = self._kept[name]
        s = s.to(tensor.device)
        if name == fold.gamma:
            return _divided(tensor, s, fold.offset)
        return tensor.float() * s if name in fold.kept_in else tensor.float() / s


def _divided(gamma: Tensor, scale: Tensor, offset: float) -> Tensor:
    return ((gamma.double() + offset) / scale - offset).to(gamma.dtype)


def exact_scale(fold: Fold, scale: Tensor, gamma: Tensor | None) -> Tensor:
    """The scale that the stored norm weight really stands for; 1 where the norm's factor is or becomes 0."""
    if gamma is None:
        return scale
    before = gamma.double() + fold.offset
    after = _divided(gamma, scale, fold.offset).double() + fold.offset
    found = before / after
    return torch.where(torch.isfinite(found) & (found > 0), found, 1.0).float()


@contextmanager
def folded(loaded: LoadedModel, folding: Folding) -> Iterator[None]:
    """The model in memory with its scales folded, inside the block.

    Units are scaled in place and back, which is exact for powers of two only; kept tensors come back bit for bit.
    """
    names = _parameters(loaded)
    before: list[tuple[nn.Parameter, Tensor]] = []
    units = [u.key for u in loaded.index.units]
    try:
        for key in units:
            weight = loaded.handle(key).get()
            weight.copy_(folding.apply(key, weight))
        for name in folding._kept:
            parameter = names[name]
            before.append((parameter, parameter.data))
            parameter.data = folding.kept(name, parameter.data).to(parameter.dtype)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
        for key in units:
            weight = loaded.handle(key).get()
            weight.copy_(folding.undo(key, weight))


def _parameters(loaded: LoadedModel) -> dict[str, nn.Parameter]:
    """Kept tensor -> its parameter, for those that the model holds as they are."""
    from bitatlas.kernels.packed.places import Places

    places, found = Places(loaded.model), {}
    for k in loaded.index.kept:
        place = places.find(k.name)
        if place is not None and place.direct and not place.stacked:
            parameter = getattr(loaded.model.get_submodule(place.module), place.param, None)
            if isinstance(parameter, nn.Parameter) and tuple(parameter.shape) == k.shape:
                found[k.name] = parameter
    return found


@torch.no_grad()
def confirmed(loaded: LoadedModel, folds: Sequence[Fold]) -> list[Fold]:
    """The folds whose kind leaves the logits of a few random tokens as they were."""
    generator = torch.Generator().manual_seed(0)
    here = _parameters(loaded)
    units = {u.key for u in loaded.index.units}
    folds = [
        f
        for f in folds
        if {n for n in (f.gamma, *f.kept, *f.kept_in) if n} <= set(here) and {*f.consumers} <= units
    ]
    ids = torch.randint(1, max(loaded.index.vocab_size, 3), (2, 12), generator=generator)
    want = loaded.logits(ids)
    out: list[Fold] = []
    for kind in dict.fromkeys(f.kind for f in folds):
        members = [f for f in folds if f.kind == kind]
        for offset in (0.0, 1.0) if members[0].gamma else (0.0,):
            tried = [replace(f, offset=offset) for f in members]
            powers = [torch.randint(-1, 3, (f.size,), generator=generator) for f in tried]
            with folded(
                loaded, Folding((f, torch.exp2(p.float())) for f, p in zip(tried, powers, strict=True))
            ):
                got = loaded.logits(ids)
            if (got - want).abs().max() <= _TOLERANCE * want.abs().max():
                out += tried
                break
    return out


def write_scales(path: Path, folding: Folding) -> None:
    """Scales and norm offsets as one safetensors file: whole or not there."""
    tensors: dict[str, Tensor] = {}
    for name, (fold, scale) in folding.scales.items():
        tensors |= {name: scale.contiguous(), f"{name} offset": torch.tensor([fold.offset])}
    write_shard(path, [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], tensors.items())


def read_scales(path: Path, folds: Iterable[Fold]) -> Folding:
    """What `write_scales` wrote, for those of ``folds`` that are in the file.

    Raises:
        UserError: the file is damaged.
    """
    with ShardReader(path) as shard:
        return Folding(
            (replace(f, offset=float(shard.read(f"{f.name} offset"))), shard.read(f.name))
            for f in folds
            if f.name in shard.tensors
        )
