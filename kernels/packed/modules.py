"""Layers whose weights stay packed: what `load` puts in place of Linear, Conv1D, Embedding and fused experts.

The arithmetic is the reference: rows are dequantised in float32, a cache-sized block at a time, cast to the
input's dtype and multiplied by torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitatlas.kernels.packed.matrix import PackedMatrix

__all__ = ["ExpertStack", "PackedEmbedding", "PackedExperts", "PackedLinear"]


def packed_linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """``x (..., cols) @ W.T + bias`` -> (..., rows)."""
    out = [F.linear(x, block) for block in matrix.blocks(x.dtype)]
    y = out[0] if len(out) == 1 else torch.cat(out, dim=-1)
    return y if bias is None else y + bias.to(y.dtype)


class PackedLinear(nn.Module):
    """A linear layer with a packed (rows, cols) weight; also stands for GPT-2's Conv1D, which only stores W.T."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.in_features, self.out_features = matrix.cols, matrix.rows
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The dequantised (rows, cols) weight; made anew at each access."""
        return self.matrix.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """(..., cols) -> (..., rows)."""
        return packed_linear(x, self.matrix, self.bias)


class PackedEmbedding(nn.Module):
    """An embedding table that unpacks only the rows asked for.

    Args:
        matrix: (vocabulary, hidden).
        dtype: of the output.
        scale: factor on the output (Gemma), or None.
    """

    _dtype: Tensor
    embed_scale: Tensor | None

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype, scale: Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.num_embeddings, self.embedding_dim = matrix.rows, matrix.cols
        # An empty buffer follows `model.to(dtype)`, which is how the output's dtype does.
        self.register_buffer("_dtype", torch.empty(0, dtype=dtype), persistent=False)
        self.register_buffer("embed_scale", scale, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The dequantised table; made anew at each access."""
        return self.matrix.dequantize(dtype=self._dtype.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ids (...) -> (..., hidden)."""
        rows = self.matrix.take_rows(ids.reshape(-1), self._dtype.dtype).view(*ids.shape, -1)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)


class ExpertStack(nn.Module):
    """One projection of all experts of a layer, every expert in a format of its own.

    Args:
        experts: expert -> its matrices; ("gate", "up") where the model fuses them, ("",) otherwise.
        bias: (experts, rows) or None.
        interleaved: output columns alternate gate, up (gpt-oss) instead of gate first.
    """

    def __init__(
        self, experts: Mapping[int, Mapping[str, PackedMatrix]], bias: Tensor | None, interleaved: bool
    ) -> None:
        super().__init__()
        self.parts = tuple(next(iter(experts.values())))
        self.experts = nn.ModuleList(
            nn.ModuleList(experts[e][p] for p in self.parts) for e in range(len(experts))
        )
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.interleaved = interleaved

    def forward(self, expert: int, x: Tensor) -> Tensor:
        """(n, cols) through expert ``expert`` -> (n, rows), gate and up joined as the model expects them."""
        matrices: nn.ModuleList = self.experts[expert]  # type: ignore[assignment]
        outs = [packed_linear(x, m) for m in matrices]  # type: ignore[arg-type]
        if len(outs) == 1:
            y = outs[0]
        elif self.interleaved:
            y = torch.stack(outs, dim=-1).flatten(-2)
        else:
            y = torch.cat(outs, dim=-1)
        return y if self.bias is None else y + self.bias[expert].to(y.dtype)


class PackedExperts(nn.Module):
    """The fused experts of transformers 5 with a format per expert and projection.

    Args:
        shell: the model's own experts module with its weights removed; its gate function and activation are used.
        up: gate and up (or up alone) of every expert.
        down: down of every expert.
    """

    def __init__(self, shell: nn.Module, up: ExpertStack, down: ExpertStack) -> None:
        super().__init__()
        self.shell, self.up, self.down = shell, up, down
        self.num_experts = len(up.experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens (T, hidden), chosen experts (T, k), routing weights (T, k) -> (T, hidden)."""
        out = torch.zeros_like(hidden_states)
        gate = getattr(self.shell, "has_gate", True)
        norm = self.shell.post_expert_norm if getattr(self.shell, "has_post_expert_norm", False) else None
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:  # the sentinel that some routers use for "nobody"
                continue
            token, slot = torch.where(top_k_index == expert)
            h = self.up(expert, hidden_states[token])
            h = self.shell._apply_gate(h) if gate else self.shell.act_fn(h)  # type: ignore[operator]
            h = self.down(expert, h)
            if norm is not None:
                h = norm(h)  # type: ignore[operator]
            out.index_add_(0, token, (h * top_k_weights[token, slot, None]).to(out.dtype))
        return out
