"""A packed checkpoint back as a transformers model, its weights still packed in memory.

Nothing in the folder is executed: no pickle, no remote code, shard names fixed, headers checked. The model is built
on the meta device; linears, embeddings and fused experts are replaced by packed ones; everything else goes through
transformers' own loader. A unit whose module is of an unknown kind is dequantised into its parameter: right, not small.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import logging as hf_logging
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.packed.manifest import Manifest, PackedUnit, shard_name
from bitatlas.kernels.packed.matrix import PackedMatrix
from bitatlas.kernels.packed.places import Places
from bitatlas.kernels.packed.replace import Replacer, tie
from bitatlas.kernels.packed.shards import ShardReader, TensorSpec
from bitatlas.kernels.packed.writer import kept_spec, unit_specs

__all__ = ["load"]

log = logging.getLogger(__name__)
# Keys of config.json that choose code rather than shapes.
_CODE_KEYS = ("auto_map", "quantization_config", "_attn_implementation", "_experts_implementation",
              "attn_implementation", "experts_implementation", "_attn_implementation_internal",
              "_experts_implementation_internal")  # fmt: skip


def load(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The transformers model in ``folder``, in evaluation mode, weights packed.

    Args:
        folder: what `bitatlas pack` wrote.
        dtype: computing dtype, and dtype of the tensors that are not packed.
        device: where it ends up.

    Raises:
        UserError: not a packed checkpoint, a damaged or missing file, an unknown architecture.
    """
    root = Path(folder)
    manifest = Manifest.read(root)
    with ExitStack() as stack:
        shards = _open_shards(root, manifest, stack)
        model = _empty_model(root, dtype)
        places = Places(model)
        tied = model.get_expanded_tied_weights_keys(all_submodels=True)
        replacer = Replacer(model, places, dtype)
        plain: dict[str, Tensor] = {k.name: shards[k.shard].read(k.name) for k in manifest.kept}
        dense = replacer.sort(manifest.units)
        for name, units in dense.items():
            plain[name] = _rebuild(units, [_matrix(shards, u).dequantize() for u in units])
        unexpected = _load_plain(model, places, plain, dtype)
        lost = unexpected & set(dense)
        if lost:
            raise UserError(f"{manifest.model.get('architecture', 'the architecture')} has no place for a packed tensor",
                            found=f"{len(lost)} such tensors, such as {min(lost)}")  # fmt: skip
        for unit in replacer.units:
            replacer.add(unit, _matrix(shards, unit))
        replacer.finish()
    tie(model, tied)
    missing = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if missing:
        raise UserError("the packed checkpoint lacks tensors that the model needs",
                        found=f"{len(missing)} missing, such as {missing[0]}")  # fmt: skip
    model.requires_grad_(False).eval()
    if (root / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(root), local_files_only=True)
    return model.to(device)


def _open_shards(root: Path, manifest: Manifest, stack: ExitStack) -> list[ShardReader]:
    want: list[list[TensorSpec]] = [[] for _ in manifest.shards]
    for u in manifest.units:
        want[u.shard] += unit_specs(u)
    for k in manifest.kept:
        want[k.shard].append(kept_spec(k))
    shards = []
    for i, specs in enumerate(want):
        shards.append(stack.enter_context(ShardReader(root / shard_name(i))))
        shards[-1].expect(specs)
    return shards


def _matrix(shards: list[ShardReader], unit: PackedUnit) -> PackedMatrix:
    tensors = {s.name.rpartition(".")[2]: shards[unit.shard].read(s.name) for s in unit_specs(unit)}
    return PackedMatrix(unit.fmt, unit.rows, unit.cols, tensors)


def _config(root: Path) -> Any:
    try:
        data = json.loads((root / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(
            f"{root / 'config.json'} cannot be read", found=str(e), fix="pack the model again"
        ) from None
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind not in CONFIG_MAPPING:
        raise UserError("the architecture is not known to transformers", found=f"model_type {kind!r}",
                        fix="a newer transformers may know it; code from checkpoints is never run")  # fmt: skip
    try:
        return CONFIG_MAPPING[kind].from_dict({k: v for k, v in data.items() if k not in _CODE_KEYS})
    except Exception as e:
        raise UserError(f"{root / 'config.json'} does not describe a model", found=str(e)[:200]) from e


def _empty_model(root: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, computed buffers real."""
    config = _config(root)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as e:
        raise UserError(
            "transformers cannot build the model that config.json describes", found=str(e)[:200]
        ) from e
    volatile = dict(model.named_non_persistent_buffers())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in volatile:
            tensor._is_hf_initialized = True
    for name, buffer in volatile.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    # What from_pretrained does for rotary frequencies and embedding scales; parameters are marked as done above.
    with guard_torch_init_functions():
        model.initialize_weights()
    return model


def _load_plain(
    model: PreTrainedModel, places: Places, plain: dict[str, Tensor], dtype: torch.dtype
) -> set[str]:
    """Everything that is not packed, through transformers' own loader. Returns names it had no place for."""
    info_config = LoadStateDictConfig(dtype=dtype, weight_mapping=places.mapping, device_map={"": "cpu"})
    with _quiet():
        info, _ = convert_and_load_state_dict_in_model(model, plain, info_config)
    bad = [*info.error_msgs, *info.conversion_errors.values(), *(str(k) for k in info.mismatched_keys)]
    if bad:
        raise UserError("a tensor of the packed checkpoint does not fit the model", found=bad[0][:200])
    return {name for name in plain if places.find(name) is None}


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no threads: the tensors are in memory already."""
    shown, before = hf_logging.is_progress_bar_enabled(), os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    hf_logging.disable_progress_bar()
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        if shown:
            hf_logging.enable_progress_bar()


def _rebuild(units: list[PackedUnit], weights: list[Tensor]) -> Tensor:
    """The checkpoint tensor that these (rows, cols) matrices came from: orientation, halves and stack restored."""
    by_expert: dict[int, dict[str, Tensor]] = defaultdict(dict)
    stacked = any("[" in u.key for u in units)
    for u, w in zip(units, weights, strict=True):
        by_expert[u.expert if stacked else -1][u.part] = w
    slices = []
    for e in sorted(by_expert):
        parts = by_expert[e]
        if "" in parts:
            w = parts[""]
        elif units[0].interleaved:
            w = torch.stack([parts["gate"], parts["up"]], dim=1).flatten(0, 1)
        else:
            w = torch.cat([parts["gate"], parts["up"]])
        slices.append(w.T if units[0].transposed else w)
    return torch.stack(slices) if stacked else slices[0].contiguous()
