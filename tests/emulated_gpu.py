"""A GPU that is not there: tensors that call themselves ``cuda:0``, hold their numbers in ordinary memory and refuse to meet the CPU's.

What fails on a real GPU fails here as well: an operation on tensors of two devices, ``numpy()`` or a pointer of a tensor
that lives there. So code that has to run on both is tested on machines that have one of them. Not emulated: speed,
memory limits, kernels of our own, and the few operations that CUDA lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["OnGpu", "emulated_gpu"]

GPU = torch.device("cuda", 0)
_NOWHERE = 1 << 62
"""In the address of a tensor's data: fit for telling tensors apart, for nothing else."""
_LENIENT = ("index", "copy", "_to_copy", "set_", "lift")
"""CUDA takes indices from the CPU, and copying between devices is what ``copy_`` is for."""


class OnGpu(Tensor):
    """A tensor "on the GPU"; ``held`` is the real one."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        out = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=held.device, requires_grad=held.requires_grad,
        )  # fmt: skip
        out.held = held
        return out

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        flat = tree_flatten((args, kwargs))[0]
        plain = [a for a in flat if isinstance(a, Tensor) and not isinstance(a, OnGpu) and a.dim() > 0]
        if plain and not name.startswith(_LENIENT):
            shapes = [(type(a).__name__, tuple(a.shape)) for a in flat if isinstance(a, Tensor)]
            raise RuntimeError(f"{name}: tensors on the GPU and the CPU meet: {shapes}")
        if name == "copy_" and not isinstance(args[0], OnGpu):  # towards the CPU
            return func(args[0], args[1].held, *args[2:], **kwargs)
        kwargs.pop("device", None)
        inner = tree_map(lambda a: a.held if isinstance(a, OnGpu) else a, (args, kwargs))
        out = tree_map(lambda a: OnGpu(a) if isinstance(a, Tensor) else a, func(*inner[0], **inner[1]))
        return return_and_correct_aliasing(func, args, kwargs, out)


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return OnGpu(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.held


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        return x.held.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return OnGpu(grad)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not isinstance(x, OnGpu):
        return _Up.apply(x) if x.requires_grad and torch.is_grad_enabled() else OnGpu(x.detach().clone())
    if device.type == "cpu" and isinstance(x, OnGpu):
        return _Down.apply(x) if x.requires_grad and torch.is_grad_enabled() else x.held.detach().clone()
    return x


class _Placing(TorchFunctionMode):
    """Moves tensors where functions are told to put them; everything below sees CPU tensors only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if name in ("cpu", "cuda") and isinstance(first, Tensor):
            return _moved(first, torch.device(name))
        if name == "to" and isinstance(first, Tensor):
            return self._to(first, args[1:], kwargs)
        if isinstance(first, OnGpu):
            if name == "data_ptr":
                return first.held.data_ptr() | _NOWHERE if first.numel() else 0
            if name in ("numpy", "__array__"):
                raise TypeError(f"{name}: can't convert cuda:0 device type tensor; use Tensor.cpu() first")
            if name == "tolist":
                return first.held.detach().tolist()
            if name == "__set__" and isinstance(args[1], OnGpu) and func == Tensor.data.__set__:
                first.held = args[1].held
                return func(*args)
            if (
                name == "backward"
            ):  # by hand: a mode is off inside the calls it sees, and hooks run inside this one
                seed = kwargs.get("gradient", args[1] if len(args) > 1 else None)
                with self:
                    seeds = (torch.ones_like(first) if seed is None else seed,)
                    keep = bool(kwargs.get("retain_graph"))
                    return _engine_run_backward(
                        (first,), seeds, keep, False, (), allow_unreachable=True, accumulate_grad=True
                    )
            if name == "scaled_dot_product_attention" and kwargs.get(
                "is_causal"
            ):  # C++ would make the mask on the CPU
                kwargs |= {
                    "is_causal": False,
                    "attn_mask": OnGpu(
                        torch.ones(first.shape[-2], args[1].shape[-2], dtype=torch.bool).tril()
                    ),
                }
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        out = func(*args, **{**kwargs, "device": torch.device("cpu")})
        return _moved(out, GPU) if isinstance(out, Tensor) else out

    def _to(self, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        target, rest = kwargs.pop("device", None), []
        for a in (*args, *([kwargs.pop("other")] if "other" in kwargs else [])):
            if isinstance(a, (str, torch.device)):
                target = a
            elif isinstance(a, Tensor):
                target, rest = a.device, [*rest, a.dtype]
            else:
                rest.append(a)
        out = _moved(x, torch.device(target)) if target is not None else x
        return out.to(*rest, **kwargs) if rest or kwargs else out


def _module_to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """``Module.to`` that keeps shared parameters shared."""
    device = torch.device(kwargs.get("device", args[0] if args else "cpu"))
    made: dict[int, nn.Parameter] = {}
    for module in self.modules():
        for name, p in module._parameters.items():
            if p is not None:
                new = made.setdefault(id(p), nn.Parameter(_moved(p.detach(), device), p.requires_grad))
                module._parameters[name] = made[id(p)] = new
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else _moved(b, device)
    return self


@contextmanager
def emulated_gpu(memory: int = 64 << 30) -> Iterator[None]:
    """Inside the block ``torch.cuda`` says that there is a GPU with ``memory`` bytes, and tensors can be put on it."""
    cuda = {
        "is_available": lambda: True, "device_count": lambda: 1, "empty_cache": lambda: None, "synchronize": lambda *_: None,
        "mem_get_info": lambda *_: (memory, memory), "current_device": lambda: 0, "get_device_name": lambda *_: "emulated",
        "get_device_properties": lambda *_: mock.Mock(total_memory=memory), "is_bf16_supported": lambda *_, **__: True,
    }  # fmt: skip
    with mock.patch.multiple(torch.cuda, **cuda), mock.patch.object(nn.Module, "to", _module_to), _Placing():
        yield
