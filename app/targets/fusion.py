"""Tie groups that engines have in common: what they fuse into one matrix or one kernel call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable

from bitatlas.analysis.schema import ModelIndex, QuantUnit, TieGroup

__all__ = ["all_experts", "expert_stacks", "fused_gate_up", "fused_qkv", "layer_experts"]


def _group(
    index: ModelIndex,
    key: Callable[[QuantUnit], Hashable | None],
    name: Callable[[QuantUnit], str],
    reason: str,
) -> tuple[TieGroup, ...]:
    """Ties of the units with equal keys (None = not tied); single units are left out."""
    members: dict[Hashable, list[QuantUnit]] = defaultdict(list)
    for unit in index.units:
        if (k := key(unit)) is not None:
            members[k].append(unit)
    return tuple(
        TieGroup(name(us[0]), tuple(u.key for u in us), reason) for us in members.values() if len(us) > 1
    )


def fused_qkv(index: ModelIndex, engine: str) -> tuple[TieGroup, ...]:
    """q, k and v of a layer; q_a and kv_a of multi-head latent attention likewise."""
    kinds = {"q": "qkv", "k": "qkv", "v": "qkv", "q_a": "qkv_a", "kv_a": "qkv_a"}
    return _group(
        index,
        lambda u: (u.layer, kinds[u.role]) if u.role in kinds and u.layer >= 0 else None,
        lambda u: f"layer {u.layer} {kinds[u.role]}",
        f"{engine} fuses q, k and v into one matrix, which has one format",
    )


def fused_gate_up(index: ModelIndex, engine: str) -> tuple[TieGroup, ...]:
    """gate and up of a dense or shared MLP."""
    kinds = {"gate": "mlp", "up": "mlp", "shared_gate": "shared", "shared_up": "shared"}
    return _group(
        index,
        lambda u: (u.layer, kinds[u.role]) if u.role in kinds and u.expert < 0 else None,
        lambda u: f"layer {u.layer} {kinds[u.role]} gate and up",
        f"{engine} fuses gate and up into one matrix, which has one format",
    )


def layer_experts(index: ModelIndex, reason: str) -> tuple[TieGroup, ...]:
    """All routed experts of a layer, all projections."""
    return _group(
        index,
        lambda u: u.layer if u.expert >= 0 else None,
        lambda u: f"layer {u.layer} experts",
        reason,
    )


def expert_stacks(index: ModelIndex, reason: str) -> tuple[TieGroup, ...]:
    """One projection of all routed experts of a layer."""
    return _group(
        index,
        lambda u: (u.layer, u.role) if u.expert >= 0 else None,
        lambda u: f"layer {u.layer} experts {u.role}",
        reason,
    )


def all_experts(index: ModelIndex, reason: str) -> tuple[TieGroup, ...]:
    """Every routed expert of the model."""
    return _group(index, lambda u: 0 if u.expert >= 0 else None, lambda u: "all experts", reason)
