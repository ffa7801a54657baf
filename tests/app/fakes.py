"""Synthetic studies: a dense model and a mixture of experts, with the structure real measurements have.

Damage falls about fourfold per bit, is larger in the first and last blocks and in down projections, and is spread
log-normally; a few rare experts are unknown, some units lie below the noise floor.
"""

from __future__ import annotations

import numpy as np

from bitatlas.analysis.schema import (
    NO_FORMAT,
    DamageRow,
    KeptTensor,
    KvGeometry,
    ModelIndex,
    QuantUnit,
    SensitivityTable,
    kv_unit,
    parse_format,
)
from bitatlas.cache.store import Store

FORMATS = tuple(f"int{b}-g64" for b in (2, 3, 4, 5, 6, 8))
SHAPES = {"q": (96, 96), "k": (32, 96), "v": (32, 96), "o": (96, 96), "gate": (256, 96), "up": (256, 96), "down": (96, 256)}  # fmt: skip
_HURT = {"q": 0.5, "k": 0.4, "v": 1.6, "o": 1.0, "gate": 0.8, "up": 1.0, "down": 2.5, "embed": 2.0}


def dense_index(layers: int = 30, name: str = "dense-30") -> ModelIndex:
    """Llama-like: one tied embedding and seven linear layers a block."""
    units = [QuantUnit("model.embed_tokens", "embed", -1, -1, 512, 96, "model.embed_tokens.weight")]
    for layer in range(layers):
        for role, (rows, cols) in SHAPES.items():
            block = "self_attn" if role in "qkvo" else "mlp"
            key = f"model.layers.{layer}.{block}.{role}_proj"
            units.append(QuantUnit(key, role, layer, -1, rows, cols, key + ".weight"))
    return _index(name, "LlamaForCausalLM", units, layers, 0)


def moe_index(layers: int = 48, experts: int = 128, name: str = "moe-48x128") -> ModelIndex:
    """Qwen3-MoE-like: attention, and three projections of every expert."""
    units = [QuantUnit("model.embed_tokens", "embed", -1, -1, 512, 96, "model.embed_tokens.weight")]
    for layer in range(layers):
        for role in "qkvo":
            key = f"model.layers.{layer}.self_attn.{role}_proj"
            units.append(QuantUnit(key, role, layer, -1, *SHAPES[role], key + ".weight"))
        for e in range(experts):
            for role, shape in (("gate", (32, 96)), ("up", (32, 96)), ("down", (96, 32))):
                key = f"model.layers.{layer}.mlp.experts.{e}.{role}_proj"
                units.append(QuantUnit(key, role, layer, e, *shape, key + ".weight"))
    units.append(QuantUnit("lm_head", "head", -1, -1, 512, 96, "lm_head.weight"))
    return _index(name, "Qwen3MoeForCausalLM", units, layers, experts)


def _index(name: str, architecture: str, units: list[QuantUnit], layers: int, experts: int) -> ModelIndex:
    digest = "".join(f"{b:02x}" for b in name.encode())[:16].ljust(64, "a")
    kept = tuple(KeptTensor(f"model.layers.{i}.norm.weight", (96,), "BF16", 192) for i in range(layers))
    kv = KvGeometry((2,) * layers, 16, (0,) * layers)
    return ModelIndex(
        f"/models/{name}", digest, name, architecture, "llama", tuple(units), kept, layers, experts, 2 if experts else 0, kv, 512
    )  # fmt: skip


def damage_table(index: ModelIndex, metric: str = "fisher_projection", seed: int = 0, floor: float = 2e-7) -> SensitivityTable:  # fmt: skip
    """(U, F) damages in nats per token; about one expert in fifty is unknown."""
    rng = np.random.default_rng(seed)
    n = len(index.units)
    depth = np.array([u.layer / max(index.n_layers - 1, 1) if u.layer >= 0 else 0.5 for u in index.units])
    role = np.array([_HURT.get(u.role, 1.0) for u in index.units])
    size = np.array([u.params for u in index.units]) / 1e4
    base = 0.02 * role * size**0.5 * (0.4 + 3 * np.exp(-8 * depth) + 2 * np.exp(-10 * (1 - depth)))
    base = base * rng.lognormal(0, 0.5, n)
    experts = np.array([u.expert for u in index.units])
    if index.n_experts:
        popularity = rng.lognormal(-1, 1.2, (index.n_layers + 1, index.n_experts))
        layer = np.array([u.layer for u in index.units])
        base = np.where(experts >= 0, base * popularity[layer, experts] / 8, base)
    bits = np.array([parse_format(f).bits for f in FORMATS])
    damage = base[:, None] * 4.0 ** (2 - bits)[None, :] * rng.lognormal(0, 0.1, (n, len(bits)))
    stderr = damage * 0.08
    count = np.full(damage.shape, 96)
    if index.n_experts:
        unseen = (experts >= 0) & (popularity[layer, experts] < 0.03)
        damage[unseen], stderr[unseen], count[unseen] = np.nan, np.nan, 0
    return SensitivityTable(metric, index.unit_keys(), FORMATS, damage, stderr, count, floor, "run-" + metric)


def rows(table: SensitivityTable) -> list[DamageRow]:
    """The table as the store's rows."""
    return [
        DamageRow(table.metric, u, f, float(table.damage[i, j]), float(table.stderr[i, j]), int(table.count[i, j]), table.floor)
        for i, u in enumerate(table.units)
        for j, f in enumerate(table.formats)
    ]  # fmt: skip


def alpha_table(index: ModelIndex, seed: int = 1) -> SensitivityTable:
    """A format-free metric."""
    rng = np.random.default_rng(seed)
    n = len(index.units)
    return SensitivityTable(
        "alphaq_alpha", index.unit_keys(), (NO_FORMAT,), rng.normal(3, 0.6, (n, 1)), np.full((n, 1), np.nan),
        np.ones((n, 1), np.int64), 0.0, "run-alpha",
    )  # fmt: skip


def kv_rows(index: ModelIndex, metric: str = "kv_fisher") -> list[DamageRow]:
    """Damage of K, V and both by layer at 2, 4 and 8 bits; K hurts five times as much, early layers most."""
    out = []
    for layer in range(index.n_layers):
        base = 0.1 * (0.3 + np.exp(-layer / 8))
        for bits in (2, 4, 8):
            for part, axis, share in (("k", "channel", 5.0), ("v", "token", 1.0)):
                out.append(
                    DamageRow(
                        metric, kv_unit(layer, part), f"kv{bits}-{axis}", base * share * 4.0**-bits, count=9
                    )
                )
            for other in (2, 4, 8):
                both = base * (5 * 4.0**-bits + 4.0**-other)
                out.append(
                    DamageRow(metric, kv_unit(layer), f"kv{bits}-channel/kv{other}-token", both, count=9)
                )
    return out


def fill(store: Store, index: ModelIndex, floor: float = 2e-7) -> str:
    """Put the model and two finished runs into a real store; returns the digest."""
    store.put_model(index)
    for table in (alpha_table(index), damage_table(index, floor=floor)):
        store.begin_run(table.run + index.name, index.digest, table.metric, formats=table.formats)
        store.write_step(table.run + index.name, "all", rows(table))
        store.finish_run(table.run + index.name)
    return index.digest
