"""One forward pass in which every query reads the cache as it would be when the tokens came one by one.

Transformers asks its cache for K and V in every attention layer; ours answers twice as many keys: as they are read when
packed, and as they are read from the 16-bit window. The attention mask is doubled alike: query i sees key j packed when
j < `KvLayout.packed(i)`, plain otherwise. One softmax over both is exactly a decoding step, and every attention function
of transformers (sinks, sliding windows, latent attention) computes it unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.kv.cache import attention_layers
from bitatlas.kernels.kv.formats import KvLayout

__all__ = ["Attention", "KvRead", "KvReader", "TapCache", "read_logits", "read_through", "tapped_logits"]

_NAME = "bitatlas_kv"


class KvRead(NamedTuple):
    """What a layer's queries read: K and V where packed, and where still in the window; (B, H, T, D) each."""

    k_packed: Tensor
    v_packed: Tensor
    k_plain: Tensor
    v_plain: Tensor


class Attention(NamedTuple):
    """One call of an attention function.

    Attributes:
        layer: whose; -1 where the module does not say.
        module: the attention module.
        output: (B, T, heads, D), before the output projection.
        weights: () -> (B, T, heads, T) attention weights, packed and plain key together; sinks make them sum to less than 1.
        reread: (K, V as read when packed, each (B, H, T, D)) -> output of the same queries, the window plain as it was in
            this call. V may hold several values side by side, (B, H, T, n D): the output has them side by side too. Shapes are
            those of the attention function; where a module caches latents, not those of the cache.
        heads: (H, D, V) of the attention function's keys and values.
    """

    layer: int
    module: nn.Module
    output: Tensor
    weights: Callable[[], Tensor]
    reread: Callable[[Tensor, Tensor], Tensor]
    heads: tuple[int, int, int]


class KvReader(Protocol):
    """Decides what the queries of a layer read."""

    layout: KvLayout

    def read(self, layer: int, k: Tensor, v: Tensor) -> KvRead | None:
        """For K and V (B, H, T, D) of a layer; None = as they are."""

    def attended(self, call: Attention) -> Tensor | None:
        """Told of every attention call; a tensor takes the place of its output."""


_ACTIVE: ContextVar[tuple[KvReader, str] | None] = ContextVar("kv_reader", default=None)


class _TapLayer(DynamicLayer):
    """Hands K and V to the reader; keeps nothing, because the sequence comes in one piece."""

    def __init__(self, index: int, reader: KvReader, sliding: bool) -> None:
        super().__init__()
        self.index, self.reader, self.is_sliding = index, reader, sliding

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        found = self.reader.read(self.index, key_states, value_states)
        if found is None:
            return key_states, value_states
        return torch.cat([found.k_packed, found.k_plain], 2), torch.cat([found.v_packed, found.v_plain], 2)

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class TapCache(Cache):
    """A cache for one forward pass of a model with ``config``; layers without K/V of their own stay transformers' own."""

    def __init__(self, config: Any, reader: KvReader) -> None:
        layers: list[Any] = list(DynamicCache(config=config).layers)
        for i, window in attention_layers(DynamicCache(config=config)).items():
            layers[i] = _TapLayer(i, reader, bool(window))
        super().__init__(layers=layers)


@contextmanager
def read_through(model: nn.Module, reader: KvReader) -> Iterator[None]:
    """Inside the block the model's attention understands doubled keys; pass a `TapCache` with each forward.

    Raises:
        UserError: an architecture whose attention cannot be exchanged.
    """
    can = getattr(model, "_can_set_attn_implementation", None)
    if can is None or not can():
        raise UserError("the KV cache of this architecture cannot be looked into",
                        found=type(model).__name__, fix="leave the KV cache at 16 bits")  # fmt: skip
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
    token = _ACTIVE.set((reader, str(getattr(model, "config")._attn_implementation)))  # noqa: B009 - an nn.Module's type
    try:
        for config, _ in before:
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        _ACTIVE.reset(token)


def read_logits(model: Any, ids: Tensor, reader: KvReader) -> Tensor:
    """Next-token logits (B, T, V), float32, of token ids (B, T), K and V read as ``reader`` says.

    Raises:
        UserError: an architecture whose attention cannot be exchanged.
    """
    with read_through(model, reader):
        return tapped_logits(model, ids, reader)


def tapped_logits(model: Any, ids: Tensor, reader: KvReader) -> Tensor:
    """`read_logits` inside a `read_through` of the same reader."""
    cache = TapCache(model.config, reader)
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits.float()


def packed_seen(layout: KvLayout, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """(T, T) bool: query i reads key j from the packed part."""
    bound = torch.tensor([layout.packed(i) for i in range(tokens)], device=device)
    return torch.arange(tokens, device=device)[None, :] < bound[:, None]


def doubled(mask: Tensor, packed: Tensor) -> Tensor:
    """The mask over packed and plain keys: (..., T, T) added to scores -> (..., T, 2 T)."""
    low = torch.finfo(mask.dtype).min
    return torch.cat([mask.masked_fill(~packed, low), mask.masked_fill(packed, low)], -1)


def _causal(query: Tensor) -> Tensor:
    n = query.shape[2]
    low = torch.finfo(query.dtype).min
    return torch.full((n, n), low, dtype=query.dtype, device=query.device).triu(1)[None, None]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Stands in for the model's attention function, and calls it."""
    active = _ACTIVE.get()
    assert active is not None
    reader, name = active
    base = ALL_ATTENTION_FUNCTIONS.get(name) if name != "eager" else None
    base = base or sys.modules[type(module).__module__].eager_attention_forward
    n = query.shape[2]
    single = _causal(query) if attention_mask is None else attention_mask[..., :n]

    def twice() -> Tensor:
        return doubled(single, packed_seen(reader.layout, n, query.device))

    mask = twice() if key.shape[2] == 2 * n else single
    output, scores = base(module, query, key, value, mask, **kwargs)

    def weights() -> Tensor:
        # The identity as values: what comes out is the weights, whatever the function does to the scores.
        m = key.shape[2]
        eye = torch.eye(m, dtype=value.dtype, device=value.device).expand(*value.shape[:2], m, m)
        found = base(module, query, key, eye, mask, **kwargs)[0]
        return found if m == n else found[..., :n] + found[..., n:]

    def reread(k: Tensor, v: Tensor) -> Tensor:
        plain = value[:, :, -n:].repeat(1, 1, 1, v.shape[-1] // value.shape[-1])
        keys, values = torch.cat([k, key[:, :, -n:]], 2), torch.cat([v, plain], 2)
        return base(module, query, keys, values, twice(), **kwargs)[0]

    heads = (key.shape[1], key.shape[3], value.shape[3])
    layer = int(getattr(module, "layer_idx", -1))
    replaced = reader.attended(Attention(layer, module, output, weights, reread, heads))
    return output if replaced is None else replaced, scores


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, eager_mask)
