"""Decode attention of a transformers model on K and V as they lie packed in a `PackedKvCache`.

Inside `attend_packed` a layer of the cache hands its attention not K and V but a `PackedView` of them. Where one new token
looks at all of them without a mask, on a GPU, the Triton kernel reads the packed words; in every other case the view
becomes an ordinary tensor as soon as anything computes with it, and transformers' own attention goes on.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bitatlas.kernels.kv.quantize import PackedKv

if TYPE_CHECKING:
    from bitatlas.kernels.kv.cache import PackedKvCache

__all__ = ["NAME", "PackedView", "attend_packed", "on_kernels"]

NAME = "bitatlas_packed_kv"
_BITS = (2, 4, 8)  # codes that do not straddle words
# Arguments under which a score is more than scaling * q k.
_MORE = ("softcap", "s_aux", "position_bias", "output_attentions")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_kernels(device: torch.device) -> bool:
    """Whether tensors there are dealt with by the Triton kernels; in the interpreter everywhere."""
    return (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1") and _has_triton()


class PackedView(Tensor):
    """K or V of a layer, (B, H, tokens, D): packed tokens from ``first`` on, then plain ones. Unpacked when touched."""

    packed: PackedKv
    plain: Tensor
    first: int

    @staticmethod
    def __new__(
        cls: type[PackedView], packed: PackedKv, plain: Tensor, first: int, dtype: torch.dtype
    ) -> PackedView:
        """The view; nothing is computed."""
        b, h, n, d = plain.shape
        shape = (b, h, packed.tokens - first + n, d)
        view: PackedView = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=plain.device)
        view.packed, view.plain, view.first = packed, plain, first
        return view

    def whole(self) -> Tensor:
        """The same as an ordinary tensor."""
        past = self.packed.dequantize(self.dtype)[:, :, self.first :]
        return torch.cat([past, self.plain.to(self.dtype)], 2)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Any operation sees ordinary tensors."""
        args, kwargs = tree_map_only(PackedView, PackedView.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function of transformers: (B, heads, T, D) queries -> (B, T, heads, DV)."""
    if not isinstance(key, PackedView) or not isinstance(value, PackedView):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    asked = any(more.get(name) not in (None, False) for name in _MORE)
    if attention_mask is not None or query.shape[2] != 1 or dropout or asked or not _readable(key, value):
        return sdpa_attention_forward(
            module, query, key.whole(), value.whole(), attention_mask, dropout, scaling, **more
        )
    from bitatlas.kernels.triton_kv import decode_attention

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = decode_attention(
        query[:, :, 0], key.packed, value.packed, key.plain, value.plain, scaling, first=key.first
    )
    return out.unsqueeze(1), None


def _readable(key: PackedView, value: PackedView) -> bool:
    """Whether the kernel can read them together."""
    same = key.first == value.first and key.packed.tokens == value.packed.tokens
    return same and key.packed.fmt.bits in _BITS and value.packed.fmt.bits in _BITS


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0, *,
    attention_mask: Tensor | None = None, local_size: int | None = None, allow_is_causal_skip: bool = True,
    config: Any = None, **more: Any,
) -> Tensor | None:  # fmt: skip
    """The mask function that belongs to `attention`: sdpa's, but none where one token sees the whole of its window."""
    chunks = getattr(config, "attention_chunk_size", None) is not None  # their windows do not slide
    if q_length == 1 and allow_is_causal_skip and local_size is not None and not chunks:
        seen = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
        if kv_length <= local_size and (seen is None or bool(seen.all())):
            return None
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip, config=config, **more,
    )  # fmt: skip


@contextmanager
def attend_packed(model: Any, cache: PackedKvCache | None) -> Iterator[None]:
    """Inside, ``model`` attends to what ``cache`` holds packed, where the kernels run; elsewhere nothing changes.

    Models that are not set to sdpa (soft caps, sinks) keep their attention and read dequantised tensors.
    """
    before = getattr(model.config, "_attn_implementation", None)
    if cache is None or before != "sdpa" or not on_kernels(model.device):
        yield
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    model.set_attn_implementation(NAME)
    cache.show_views(True)
    try:
        yield
    finally:
        cache.show_views(False)
        model.set_attn_implementation(before)
