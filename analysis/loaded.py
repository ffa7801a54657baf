"""A checkpoint as a running transformers model whose every unit can be read, replaced, watched and differentiated.

transformers never sees the checkpoint's folder: config and weights are read and checked by this package and
handed over as objects, so no file name, no remote code and no pickle of the checkpoint can reach it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitatlas.analysis.checkpoint import CheckpointFiles, sanitized
from bitatlas.analysis.experts_hook import use_eager_experts, watch_experts
from bitatlas.analysis.model_index import is_mxfp4
from bitatlas.analysis.schema import ModelIndex
from bitatlas.analysis.unit_map import UnitHandle, expert_modules, map_units
from bitatlas.analysis.weights import WeightReader
from bitatlas.kernels.errors import UserError

if TYPE_CHECKING:
    from bitatlas.analysis.kv.tap import KvReader

__all__ = ["Callback", "LoadedModel"]

Callback = Callable[[str, Tensor, Tensor, Tensor | None], None]
"""(unit key, x (n, cols), token_index (n,), routing_weight (n,) or None)."""


class LoadedModel:
    """A transformers model in eval mode, parameters frozen until `requires_grad` asks for some.

    Attributes:
        index: what was loaded.
        model: the transformers model, None after `free`.
        device: where it lives.
    """

    def __init__(self, index: ModelIndex, model: nn.Module, device: torch.device) -> None:
        self.index = index
        self.model: Any = model
        self.device = device
        self._handles = map_units(index, model)
        self._reader: KvReader | None = None
        use_eager_experts(model)

    @classmethod
    def open(
        cls, index: ModelIndex, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
        attention: str | None = None,
    ) -> LoadedModel:  # fmt: skip
        """Build the model and fill it from the checkpoint.

        Args:
            index: from `index_model`; a GGUF file has to be imported first.
            dtype: of the parameters in memory.
            device: of the model.
            attention: transformers' attn_implementation; ``"eager"`` where second derivatives are needed.

        Raises:
            UserError: an architecture that transformers does not know (weights-only metrics still work), a tensor
                that the architecture needs and the checkpoint lacks, NaN or Inf weights, a malformed checkpoint.
        """
        with WeightReader(index) as reader:
            model = _build(index, reader, dtype, attention)
        model.to(device)
        model.eval().requires_grad_(False)
        return cls(index, model, torch.device(device))

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer.

        Raises:
            UserError: it has none, or one that needs code of its own.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.index.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as e:  # noqa: BLE001 - the library raises anything from OSError to pydantic errors here
            raise UserError("the checkpoint's tokenizer cannot be loaded", found=f"{type(e).__name__}: {e}"[:300],
                            fix="put the model's tokenizer.json and tokenizer_config.json into the folder") from None  # fmt: skip

    def handle(self, unit_key: str) -> UnitHandle:
        """The unit's place in memory.

        Raises:
            UserError: no such unit.
        """
        if unit_key not in self._handles:
            raise UserError(
                f"there is no unit {unit_key!r}", found=f"{len(self._handles)} in {self.index.name}"
            )
        return self._handles[unit_key]

    def logits(self, ids: Tensor) -> Tensor:
        """Next-token logits (B, T, V), float32, of token ids (B, T); keeps the graph when parameters need it."""
        ids = ids.to(self.device)
        if self._reader is None:
            return self.model(input_ids=ids, use_cache=False).logits.float()
        from bitatlas.analysis.kv.tap import tapped_logits

        return tapped_logits(self.model, ids, self._reader)

    @contextmanager
    def cached(self, reader: KvReader) -> Iterator[LoadedModel]:
        """Inside the block every forward reads K and V as ``reader`` says (`analysis.kv`).

        Raises:
            UserError: an architecture whose attention cannot be looked into.
        """
        from bitatlas.analysis.kv.tap import read_through

        before = self._reader
        with read_through(self.model, reader):
            self._reader = reader
            try:
                yield self
            finally:
                self._reader = before

    def run_body(self, ids: Tensor) -> None:
        """The model without its head on token ids (B, T), for those who watch its layers."""
        body = self.model.base_model
        if body is self.model:
            self.logits(ids)
        else:
            body(input_ids=ids.to(self.device), use_cache=False)

    @contextmanager
    def requires_grad(self, units: Iterable[str]) -> Iterator[list[nn.Parameter]]:
        """Parameters that hold these units get gradients inside the block; yields them, each once."""
        params = list({id(p): p for p in (self.handle(u).param for u in units)}.values())
        try:
            for p in params:
                p.requires_grad_(True)
            yield params
        finally:
            for p in params:
                p.requires_grad_(False)
                p.grad = None

    @contextmanager
    def swapped(self, weights: Mapping[str, Tensor]) -> Iterator[LoadedModel]:
        """Other weights (rows, cols) inside the block; the originals come back bit for bit, also after an error."""
        before: dict[str, Tensor] = {}
        try:
            for key, weight in weights.items():
                before[key] = self.handle(key).exchange(weight)
            yield self
        finally:
            for key, weight in before.items():
                self.handle(key).exchange(weight)

    @contextmanager
    def capture(self, callback: Callback, units: Iterable[str] | None = None) -> Iterator[None]:
        """Report the input of every unit that is a matrix product, during any forward inside the block.

        ``token_index`` counts the flattened (B, T) positions. An expert is reported once per forward with the
        tokens routed to it and their routing weights, and not at all when it gets none; gate and up see the same
        x, down the intermediate. An embedding is reported only where it also is the (tied) head.
        """
        wanted = set(self._handles if units is None else units)
        ends: list[Callable[[], None]] = []
        try:
            for module, keys in self._matmuls(wanted):
                ends.append(_watch_linear(module, keys, callback))
            for layer, module in expert_modules(self.model).items():
                keys_of = {(u.expert, u.role): u.key for u in self.index.units
                           if u.layer == layer and u.expert >= 0 and u.key in wanted}  # fmt: skip
                if keys_of:
                    ends.append(watch_experts(module, _expert_watcher(keys_of, callback)))
            yield
        finally:
            for end in ends:
                end()

    def _matmuls(self, wanted: set[str]) -> list[tuple[nn.Module, list[str]]]:
        """Modules that multiply by a 2-D unit, with the units they hold (two for a fused gate_up)."""
        keys: dict[int, list[str]] = {}
        for key in self._handles:
            if key in wanted and self._handles[key].expert < 0:
                keys.setdefault(id(self._handles[key].param), []).append(key)
        return [
            (module, keys[id(module.weight)])
            for module in self.model.modules()
            if not isinstance(module, nn.Embedding) and id(getattr(module, "weight", None)) in keys
        ]

    def free(self) -> None:
        """Drop the model and give its memory back."""
        self.model = None
        self._handles = {}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _watch_linear(module: nn.Module, keys: list[str], callback: Callback) -> Callable[[], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        x = x.reshape(-1, x.shape[-1])  # (tokens, cols)
        token = torch.arange(x.shape[0], device=x.device)
        for key in keys:
            callback(key, x, token, None)

    return module.register_forward_pre_hook(hook).remove


def _expert_watcher(keys: Mapping[tuple[int, str], str], callback: Callback) -> Callable[..., None]:
    def watcher(expert: int, x: Tensor, intermediate: Tensor, token: Tensor, weight: Tensor) -> None:
        for role, seen in (("gate", x), ("up", x), ("down", intermediate)):
            if (expert, role) in keys:
                callback(keys[expert, role], seen, token, weight)

    return watcher


def _config(files: CheckpointFiles, index: ModelIndex) -> tuple[Any, Any]:
    """(config, causal language model class) of a checked config.json."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as causal
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as image_text

    raw = sanitized(files.config)
    raw.pop("quantization_config", None)  # The reader hands over plain weights.
    model_type = raw.get("model_type")
    unknown = UserError(
        f"transformers does not know the architecture of {index.name}",
        found=f"model_type {model_type!r}, architecture {index.architecture or 'not given'}",
        fix="metrics that need only the weights still work (`bitatlas metrics` names them)",
    )
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise unknown
    try:
        config = CONFIG_MAPPING[model_type].from_dict(raw)
    except Exception as e:  # noqa: BLE001 - config classes raise whatever their validators raise
        raise UserError("config.json is not valid for its model type", found=f"{model_type}: {e}"[:300],
                        fix="download config.json again") from None  # fmt: skip
    found = max((u.layer for u in index.units), default=-1) + 1
    if found and index.n_layers > found:
        # Building thousands of layers that have no weights would take the machine with it.
        raise UserError("config.json and the weights disagree about the layers",
                        found=f"{index.n_layers} layers in config.json, {found} in the checkpoint",
                        fix="download config.json again")  # fmt: skip
    kinds = [m[type(config)] for m in (causal, image_text) if type(config) in m]
    if not kinds:
        raise unknown
    # A model with pictures may have both; the class that wrote the checkpoint knows its names.
    return config, next((k for k in kinds if k.__name__ == index.architecture), kinds[0])


def _in_model(reader: WeightReader, name: str) -> tuple[str, Tensor]:
    """Name and value of a stored tensor as transformers expects it: MXFP4 blocks become (experts, in, out)."""
    tensor = reader.tensor(name)
    if is_mxfp4(reader.files.tensors[name][1]):
        return name.removesuffix("_blocks"), tensor.transpose(1, 2).contiguous()
    return name, tensor


def _build(index: ModelIndex, reader: WeightReader, dtype: torch.dtype, attention: str | None) -> nn.Module:
    """The filled model, on the CPU."""
    from transformers.utils import logging

    config, kind = _config(reader.files, index)
    names = {u.tensor for u in index.units} | {k.name for k in index.kept}
    state = dict(_in_model(reader, name) for name in reader.files.tensors if name in names)
    options = {"attn_implementation": attention} if attention else {}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **options
        )
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"the weights do not fit the architecture {index.architecture or index.model_type}",
                        found=str(e)[:300], fix="check that config.json belongs to these weights") from e  # fmt: skip
    finally:
        if bars:
            logging.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        raise UserError(
            f"the checkpoint lacks {len(missing)} tensors of {type(model).__name__} or has them in another shape",
            found=", ".join([*missing, *map(str, report["mismatched_keys"])][:4]),
            fix="check that config.json belongs to these weights",
        )
    has_head = any(u.role == "head" for u in index.units)
    head = model.get_output_embeddings()
    if not has_head and head is not None and head.weight is not model.get_input_embeddings().weight:
        head.weight = model.get_input_embeddings().weight
    return model
