"""A transformers cache whose layers keep K and V bit-packed, each layer in formats of its own.

Layers that slide keep their window, layers that share another's K/V or have none (linear attention) stay transformers'
own. A token is read back from the packed part from the step after its block has left the 16-bit window; the attention of
a chunk sees the chunk itself as it is (KIVI's decoding order: attention first, packing after).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.kv.attention import PackedView, on_kernels
from bitatlas.kernels.kv.formats import KvFormat, KvLayout, KvPair
from bitatlas.kernels.kv.quantize import PackedKv, pack_kv, to_16_bits

__all__ = ["PackedKvCache", "PackedKvLayer", "attention_layers"]


class _Half:
    """K or V of one layer: packed tokens, then the window at 16 bits."""

    def __init__(self, fmt: KvFormat) -> None:
        self.fmt = fmt
        self.packed: PackedKv | None = None
        self.plain: Tensor | None = None

    def read(self, dtype: torch.dtype) -> list[Tensor]:
        parts = [self.packed.dequantize(dtype)] if self.packed is not None and self.packed.tokens else []
        return parts if self.plain is None else [*parts, self.plain.to(dtype)]

    def view(self, new: Tensor, window: int) -> PackedView | None:
        """What `read` gives, and ``new`` behind it, still packed; None where nothing is."""
        if self.packed is None or self.plain is None or not self.packed.tokens:
            return None
        # A sliding layer holds whole blocks, hence up to a block more than it shows.
        past = self.packed.tokens + self.plain.shape[2]
        hidden = max(past - window + 1, 0) if window else 0
        first = min(hidden, self.packed.tokens)
        plain = torch.cat([self.plain[:, :, hidden - first :], to_16_bits(new)], 2)
        return PackedView(self.packed, plain, first, new.dtype)

    def add(self, x: Tensor) -> None:
        self.plain = x if self.plain is None else torch.cat([self.plain, x], 2)

    def settle(self, seen: int, layout: KvLayout, window: int) -> None:
        """Packs and lets go what the layout says for ``seen`` tokens."""
        assert self.plain is not None
        held = self.packed.tokens if self.packed is not None else 0
        if self.fmt.axis == "none":
            self.plain = self.plain[:, :, -window:].contiguous() if window else self.plain
            return
        packed, plain = layout.split(seen, window)
        # Tokens of the window that the packed part takes over, whole blocks of them.
        fresh = self.plain.shape[2] - (seen - layout.packed(seen))
        if fresh > 0:
            block = _packed(self.plain[:, :, :fresh], self.fmt, layout.block)
            self.packed = block if self.packed is None else self.packed.extend(block)
            held += fresh
        self.plain = self.plain[:, :, self.plain.shape[2] - plain :].contiguous()
        if self.packed is not None and held > packed:
            self.packed = self.packed.drop(held - packed)

    def change(self, f: Any) -> None:
        self.packed = None if self.packed is None else self.packed.map(f)
        self.plain = None if self.plain is None else f(self.plain)

    @property
    def nbytes(self) -> int:
        plain = 0 if self.plain is None else self.plain.numel() * self.plain.element_size()
        return plain + (self.packed.nbytes if self.packed is not None else 0)


def _packed(x: Tensor, fmt: KvFormat, block: int) -> PackedKv:
    """`pack_kv`, by the kernel where it runs; the same bits."""
    if not on_kernels(x.device) or x.shape[2] % block:
        return pack_kv(x, fmt, block)
    from bitatlas.kernels import triton_kv

    return triton_kv.pack_kv(x, fmt, block)


class PackedKvLayer(DynamicLayer):
    """One layer's packed K and V.

    Args:
        pair: their formats.
        layout: rules of the 16-bit window.
        window: tokens that a sliding layer sees, 0 for all.
    """

    is_croppable = False

    def __init__(self, pair: KvPair, layout: KvLayout, window: int = 0) -> None:
        super().__init__()
        self.views = False  # hand out packed views instead of tensors
        self.pair, self.layout, self.window = pair, layout, window
        self.is_sliding = bool(window)
        self.reset()

    def reset(self) -> None:
        """Empty again."""
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = 0
        self._k, self._v = _Half(self.pair.k), _Half(self.pair.v)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note type and place; nothing is reserved."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Everything a query of this chunk may see, (B, H, tokens, D) each; then the chunk is kept.

        A sliding layer gives the last ``window - 1`` of the past, as transformers' mask expects. With ``views`` set a
        single token gets packed views where both K and V are packed.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        out: list[Tensor] = []
        views = self._views(key_states, value_states)
        for half, new, view in zip((self._k, self._v), (key_states, value_states), views):
            # 16 bits whatever the model computes in: that is what the window costs.
            kept = to_16_bits(new)
            if view is not None:
                out.append(view)
            else:
                past = half.read(new.dtype)
                if past and self.window:
                    past = [
                        torch.cat(past, 2)[:, :, -self.window + 1 :] if self.window > 1 else new[:, :, :0]
                    ]
                out.append(torch.cat([*past, kept.to(new.dtype)], 2))
            half.add(kept)
            half.settle(self.seen, self.layout, self.window)
        return out[0], out[1]

    def _views(self, *new: Tensor) -> tuple[PackedView | None, PackedView | None]:
        if not self.views or new[0].shape[2] != 1:
            return None, None
        k, v = (half.view(x, self.window) for half, x in zip((self._k, self._v), new))
        return (k, v) if k is not None and v is not None else (None, None)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys a query of this length gets, position of the first one)."""
        past = min(self.seen, self.window - 1) if self.window else self.seen
        return past + query_length, self.seen - past

    def get_max_length(self) -> int:
        """The window of a sliding layer, -1 otherwise."""
        return self.window or -1

    @property
    def nbytes(self) -> int:
        """Bytes that K and V take now, measured on the tensors."""
        return self._k.nbytes + self._v.nbytes

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams change places."""
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence several times."""
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these sequences."""
        self._change(lambda t: t[indices])

    def _change(self, f: Any) -> None:
        self._k.change(f)
        self._v.change(f)

    def crop(self, tokens_to_remove: int) -> None:
        """Only the no-op: packed blocks cannot be opened.

        Raises:
            RuntimeError: tokens would have to go.
        """
        if tokens_to_remove:
            raise RuntimeError("a packed KV cache cannot be cropped; generate without an assistant model")

    def offload(self) -> None:
        """To the CPU."""
        self._change(lambda t: t.to("cpu"))

    def prefetch(self) -> None:
        """Back to the device."""
        if self.is_initialized:
            self._change(lambda t: t.to(self.device))


def attention_layers(cache: Cache) -> dict[int, int]:
    """Layer -> sliding window (0 = none) of the layers that keep K and V token by token and nothing else."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer, PackedKvLayer)
    return {
        i: int(getattr(layer, "sliding_window", 0) or getattr(layer, "window", 0))
        for i, layer in enumerate(cache.layers)
        if type(layer) in kinds
    }


class PackedKvCache(Cache):
    """For ``model.generate(past_key_values=PackedKvCache(model.config, plan))``.

    Args:
        config: of the model; says which layers slide, share or have no cache.
        plan: layer -> formats; layers that are not named keep 16 bits.
        layout: rules of the 16-bit window.

    Raises:
        UserError: a layer that has no K/V of its own.
    """

    def __init__(self, config: Any, plan: Mapping[int, KvPair], layout: KvLayout | None = None) -> None:
        plain = DynamicCache(config=config)
        windows = attention_layers(plain)
        wrong = sorted(set(plan) - set(windows))
        if wrong:
            raise UserError(f"layer {wrong[0]} keeps no K/V of its own that could be packed",
                            found=f"{len(windows)} of {len(plain.layers)} layers keep K/V",
                            fix="leave it out of the KV formats")  # fmt: skip
        layout = layout or KvLayout()
        layers = list(plain.layers)
        for i, pair in plan.items():
            layers[i] = PackedKvLayer(pair, layout, windows[i])
        super().__init__(layers=layers)

    def show_views(self, shown: bool) -> None:
        """Whether layers give their attention packed views (`kernels.kv.attention`) of K and V."""
        for layer in self.layers:
            if isinstance(layer, PackedKvLayer):
                layer.views = shown

    @property
    def nbytes(self) -> int:
        """Bytes of K and V of all layers now; layers at the model's own precision counted as they lie in memory."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, PackedKvLayer):
                total += layer.nbytes
            elif isinstance(getattr(layer, "keys", None), Tensor):
                total += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
        return total
