"""Layers whose weights stay packed: what `load` puts in place of Linear, Conv1D, Embedding and fused experts.

The reference dequantises rows in float32, a cache-sized block at a time, casts them to the input's dtype and lets torch
multiply. Few rows on the CPU go to the compiled product of `kernels.cpu` where there is a compiler, a GPU's to the Triton
kernels; neither dequantises to memory. ``BITATLAS_KERNELS=torch`` keeps to the reference.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitatlas.kernels import cpu
from bitatlas.kernels.packed.matrix import PackedMatrix

if TYPE_CHECKING:
    from bitatlas.kernels.triton_experts import ExpertTable, Routing

__all__ = ["ExpertStack", "PackedEmbedding", "PackedExperts", "PackedLinear"]


def _on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernels run this input."""
    return x.is_cuda and os.environ.get("BITATLAS_KERNELS") != "torch" and find_spec("triton") is not None


def packed_linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """``x (..., cols) @ W.T + bias`` -> (..., rows)."""
    if _on_gpu(x) and matrix.format.kind == "int":
        from bitatlas.kernels.triton_linear import linear

        y = linear(x, matrix)
    elif cpu.available(x, matrix):
        y = cpu.linear(x, matrix)
    else:
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
        self._tables: tuple[int, list[ExpertTable]] | None = None

    @property
    def kinds(self) -> set[str]:
        """Kinds of the formats in the stack."""
        return {m.format.kind for m in self.modules() if isinstance(m, PackedMatrix)}

    def forward(self, expert: int, x: Tensor) -> Tensor:
        """(n, cols) through expert ``expert`` -> (n, rows), gate and up joined as the model expects them."""
        matrices: nn.ModuleList = self.experts[expert]  # type: ignore[assignment]
        outs = [packed_linear(x, m) for m in matrices]  # type: ignore[arg-type]
        y = self._join(outs)
        return y if self.bias is None else y + self.bias[expert].to(y.dtype)

    def _join(self, outs: list[Tensor]) -> Tensor:
        if len(outs) == 1:
            return outs[0]
        return torch.stack(outs, dim=-1).flatten(-2) if self.interleaved else torch.cat(outs, dim=-1)

    def tables(self) -> list[ExpertTable]:
        """The stack as the grouped kernel sees it, one table per part; made again when the buffers have moved."""
        from bitatlas.kernels.triton_experts import ExpertTable

        first = next(self.buffers()).data_ptr()
        if self._tables is None or self._tables[0] != first:
            parts = [[stack[i] for stack in self.experts] for i in range(len(self.parts))]  # type: ignore[index]
            self._tables = first, [ExpertTable.build(p) for p in parts]
        return self._tables[1]

    def grouped(self, x: Tensor, source: Tensor, routing: Routing, expert: Tensor) -> Tensor:
        """All experts in one launch per part: sorted pairs (n,), taking rows ``source`` of x -> (n, rows)."""
        from bitatlas.kernels.triton_experts import grouped_linear

        y = self._join([grouped_linear(x, source, routing, t) for t in self.tables()])
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
        # The grouped kernel reads integer codes and 16-bit weights.
        self._groupable = up.kinds | down.kinds <= {"int", "float"}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens (T, hidden), chosen experts (T, k), routing weights (T, k) -> (T, hidden)."""
        if self._groupable and _on_gpu(hidden_states):
            return self._grouped(hidden_states, top_k_index, top_k_weights)
        out = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:  # the sentinel that some routers use for "nobody"
                continue
            token, slot = torch.where(top_k_index == expert)
            h = self._normed(self.down(expert, self._gated(self.up(expert, hidden_states[token]))))
            out.index_add_(0, token, (h * top_k_weights[token, slot, None]).to(out.dtype))
        return out

    def _gated(self, h: Tensor) -> Tensor:
        gate = getattr(self.shell, "has_gate", True)
        return self.shell._apply_gate(h) if gate else self.shell.act_fn(h)  # type: ignore[operator]

    def _normed(self, h: Tensor) -> Tensor:
        has_norm = getattr(self.shell, "has_post_expert_norm", False)
        return self.shell.post_expert_norm(h) if has_norm else h  # type: ignore[operator]

    def _grouped(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The same with one launch per projection, whatever formats the experts have."""
        from bitatlas.kernels.triton_experts import route

        (tokens, chosen), flat = top_k_index.shape, top_k_index.reshape(-1)
        routing = route(top_k_index, self.down.tables()[0])
        expert = flat[routing.pair]
        h = self._gated(self.up.grouped(x, routing.token, routing, expert))
        own = torch.arange(h.shape[0], device=h.device)
        h = self._normed(self.down.grouped(h, own, routing, expert))
        # Back in the order of the tokens and summed over the slots: no atomics, the same result every time.
        slots = h.new_zeros(tokens * chosen, h.shape[-1], dtype=torch.float32)
        slots[routing.pair] = h.float() * top_k_weights.reshape(-1, 1)[routing.pair]
        return slots.view(tokens, chosen, -1).sum(1).to(x.dtype)
