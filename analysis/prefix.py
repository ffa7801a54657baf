"""Prefix reuse: after a change in block l only the blocks from l on are computed again, exactly.

The whole model is called, so masks, position embeddings and the head are the model's own; the blocks before l hand
on what they had returned in the recorded run of the original model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.kernels.errors import UserError

__all__ = [
    "PrefixRunner",
    "Recording",
    "decoder_blocks",
    "held_bytes",
    "needed_blocks",
    "replaced_blocks",
    "resumes",
    "stream_before",
    "stream_behind",
]


def decoder_blocks(model: nn.Module, n_layers: int) -> nn.ModuleList | None:
    """The list of decoder blocks: the outermost `ModuleList` with ``n_layers`` members that hold weights."""
    for module in model.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == n_layers
            and all(any(True for _ in child.parameters()) for child in module)
        ):
            return module
    return None


def needed_blocks(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """`decoder_blocks` for a metric that cannot do without.

    Raises:
        UserError: the architecture is not a plain stack of blocks.
    """
    blocks = decoder_blocks(model, n_layers)
    if blocks is None:
        raise UserError(
            "this architecture is not a plain stack of blocks",
            found=f"{type(model).__name__} with {n_layers} layers",
            fix="measure units instead of blocks; `bitatlas metrics` lists the metrics",
        )
    return blocks


def stream_before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a block, or a part of it, was called with, as `stream_behind` gives what it returns."""
    return stream_behind(args[0] if args else kwargs["hidden_states"])


def stream_behind(output: Any) -> Tensor:
    """(B, T, d) of what a block returned; several copies (Gemma 3n's AltUp: (A, B, T, d)) side by side, (B, T, A d)."""
    x: Tensor = output[0] if isinstance(output, tuple) else output
    return x if x.dim() == 3 else x.permute(1, 2, 0, 3).flatten(2)


@dataclass(frozen=True, slots=True)
class Recording:
    """One run of the original model.

    Attributes:
        ids: (B, T) int64.
        outputs: what every block returned.
        logits: (B, T, V).
    """

    ids: Tensor
    outputs: tuple[Any, ...]
    logits: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the kept tensors."""
        return held_bytes((self.logits, *self.outputs))


class PrefixRunner:
    """Runs a model from any block on.

    Args:
        loaded: the model, original weights in place while recording.
        n_layers: blocks according to the index.
    """

    def __init__(self, loaded: LoadedModel, n_layers: int) -> None:
        self._loaded = loaded
        blocks = decoder_blocks(loaded.model, n_layers)
        self._blocks = list(blocks) if blocks is not None else []
        self.exact: bool | None = None if self._blocks else False

    @torch.no_grad()
    def record(self, ids: Tensor) -> Recording:
        """A whole run of (B, T) ids; the first one also tries out that resuming changes nothing."""
        recording = self._recorded(ids, ())
        if self.exact is None:
            # Models whose blocks share state (KV of an earlier block) fail this and are run whole.
            self.exact = all(
                resumes(self._loaded, ids, recording.logits, self._blocks[:n], recording.outputs[:n], 1e-5)
                for n in {1, len(self._blocks) // 2, len(self._blocks)}
            )
        return recording

    @torch.no_grad()
    def again(self, recording: Recording, layer: int) -> Recording:
        """`resume`, recorded: a later run can start from this one's blocks."""
        return self._recorded(recording.ids, recording.outputs[: max(layer, 0)] if self.exact else ())

    def _recorded(self, ids: Tensor, known: tuple[Any, ...]) -> Recording:
        """A run whose first blocks return ``known``."""
        outputs: list[Any] = [None] * len(self._blocks)

        def keep(i: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                outputs[i] = output

            return hook

        handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(self._blocks)]
        try:
            with replaced_blocks(self._blocks[: len(known)], known):
                logits = self._loaded.logits(ids)
        finally:
            for handle in handles:
                handle.remove()
        return Recording(ids, tuple(outputs), logits)

    @torch.no_grad()
    def resume(self, recording: Recording, layer: int) -> Tensor:
        """(B, T, V) logits with the weights as they are now, blocks before ``layer`` as recorded.

        ``layer`` = number of blocks recomputes only what follows the last block; 0 or less runs the whole.
        """
        if not self.exact or layer <= 0:
            return self._loaded.logits(recording.ids)
        with replaced_blocks(self._blocks[:layer], recording.outputs[:layer]):
            return self._loaded.logits(recording.ids)


@contextmanager
def replaced_blocks(blocks: list[nn.Module], outputs: tuple[Any, ...]) -> Iterator[None]:
    """These blocks return what they are given here instead of computing."""
    try:
        for block, output in zip(blocks, outputs):
            # An instance attribute shadows the class's forward; hooks of the block still run.
            block.__dict__["forward"] = lambda *args, _output=output, **kwargs: _output
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def resumes(
    loaded: LoadedModel, ids: Tensor, whole: Tensor, blocks: list[nn.Module], outputs: tuple[Any, ...], tolerance: float = 0.0
) -> bool:  # fmt: skip
    """Whether ids (B, T) still end in the logits of the ``whole`` run where these blocks return ``outputs``."""
    try:
        with replaced_blocks(blocks, outputs):
            return torch.allclose(loaded.logits(ids), whole, rtol=tolerance, atol=tolerance)
    except Exception:  # noqa: BLE001 - a model that misses what a block left elsewhere may raise anything
        return False


def held_bytes(value: Any) -> int:
    """Memory of the tensors in what a block returned."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(held_bytes, value)) if isinstance(value, (tuple, list)) else 0
