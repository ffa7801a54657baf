"""One attention module run again and again on the input it had, its cache read in other ways each time."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from bitatlas.analysis.kv.tap import Attention, KvRead, TapCache
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.kernels.kv.formats import KvLayout
from bitatlas.kernels.kv.quantize import to_16_bits

__all__ = ["AttentionReplay", "Replayed"]


class _Reader:
    """Notes K, V and the attention calls; reads ``instead`` where it is set."""

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self.instead: tuple[Tensor, Tensor] | None = None
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.calls: dict[int, Attention] = {}

    def read(self, layer: int, k: Tensor, v: Tensor) -> KvRead | None:
        self.kv[layer] = k, v
        return (
            None
            if self.instead is None
            else KvRead(*self.instead, *(to_16_bits(x).to(x.dtype) for x in (k, v)))
        )

    def attended(self, call: Attention) -> None:
        self.calls[call.layer] = call


class Replayed:
    """One layer's attention on one batch.

    Attributes:
        layer: number; k, v: (B, H, T, D) as they go into the cache.
        output: (B, T, heads, D) of the original.
    """

    def __init__(self, replay: AttentionReplay, layer: int, args: Any, kwargs: Any, call: Attention) -> None:
        self._replay, self._args, self._kwargs, self._module = replay, args, kwargs, call.module
        self.layer = layer
        self.k, self.v = replay.reader.kv[layer]
        self.output, self._first = call.output, call

    @cached_property
    def weights(self) -> Tensor:
        """Of the original."""
        return self._first.weights()

    def changes(self, k: Tensor, values: Sequence[Tensor]) -> Tensor:
        """(B, T, heads, n, D) change of the output with this K and each of n V in the packed part, the window as it is."""
        if self._first.heads == (k.shape[1], k.shape[3], self.v.shape[3]):  # one softmax for all values
            found = self._first.reread(k, torch.cat(list(values), -1)).unflatten(-1, (len(values), -1))
            return found - self.output.unsqueeze(-2)
        # The module makes its keys from what it caches, so it has to run; its window is read in 16 bits both times.
        return torch.stack([self.with_packed(k, v)[0] - self._unchanged for v in values], -2)

    @cached_property
    def _unchanged(self) -> Tensor:
        """Output with the window read in 16 bits and nothing else changed."""
        return self.with_packed(self.k, self.v)[0]

    def with_packed(self, k: Tensor, v: Tensor, *, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Output, and weights when asked for, with these K and V in the packed part of the cache."""
        reader = self._replay.reader
        reader.instead = k, v
        try:
            call = self._call(self._kwargs)
        finally:
            reader.instead = None
        return call.output, call.weights() if weights else None

    def before_rotation(self) -> Tensor | None:
        """K before its rotary embedding; None where this module has none, or one of an unknown kind."""
        pair = self._kwargs.get("position_embeddings")
        if not (isinstance(pair, tuple) and len(pair) == 2):
            return None
        still = (torch.ones_like(pair[0]), torch.zeros_like(pair[1]))
        # Without rotation the module hands its bare key to the cache.
        self._call({**self._kwargs, "position_embeddings": still})
        bare = self._replay.reader.kv[self.layer][0]
        rotated = self.rotate(bare)
        same = rotated is not None and torch.allclose(
            rotated, self.k, rtol=1e-3, atol=1e-4 * float(self.k.abs().max())
        )
        return bare if same else None

    def rotate(self, k: Tensor) -> Tensor | None:
        """K with the rotary embedding, by the model's own function."""
        turn = getattr(sys.modules[type(self._module).__module__], "apply_rotary_pos_emb", None)
        if turn is None:
            return None
        try:
            return turn(k, k, *self._kwargs["position_embeddings"])[1]
        except (TypeError, RuntimeError, ValueError):
            return None  # a function of another signature: then the rotation is unknown, not absent

    def _call(self, kwargs: Any) -> Attention:
        fresh = TapCache(self._replay.loaded.model.config, self._replay.reader)

        def swap(x: Any) -> Any:
            return fresh if isinstance(x, Cache) else x

        self._module(*map(swap, self._args), **{k: swap(x) for k, x in kwargs.items()})
        return self._replay.reader.calls[self.layer]


class AttentionReplay:
    """Runs a model once and yields its attention layers, ready to be run again.

    Args:
        loaded: the model.
        layout: rules of the cache's window.
    """

    def __init__(self, loaded: LoadedModel, layout: KvLayout) -> None:
        self.loaded, self.reader = loaded, _Reader(layout)
        self._modules: dict[int, nn.Module] = {}

    @torch.no_grad()
    def run(self, ids: Tensor) -> Iterator[Replayed]:
        """Attention layers of one forward pass of (B, T) ids, in order."""
        with self.loaded.cached(self.reader):
            if not self._modules:
                # Which module belongs to a layer shows when it attends.
                self.loaded.logits(ids[:, :2])
                self._modules = {
                    i: call.module for i, call in self.reader.calls.items() if i in self.reader.kv
                }
            inputs: dict[int, tuple[Any, Any]] = {}
            with ExitStack() as stack:
                for layer, module in self._modules.items():

                    def keep(_: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                        inputs[layer] = args, kwargs

                    stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
                self.loaded.logits(ids)
            calls = dict(self.reader.calls)
            for layer in self._modules:
                yield Replayed(self, layer, *inputs[layer], calls[layer])
