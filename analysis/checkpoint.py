"""The files of a Hugging Face checkpoint folder, checked before anyone else opens them. Torch-free.

Promises: nothing outside the folder is opened (a hub-cache link into the same repository's ``blobs/`` is inside),
no pickle is read, no code named by the config is run, every tensor is in exactly one shard.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitatlas.analysis.safetensors_header import Header, TensorInfo, open_regular, read_header
from bitatlas.kernels.errors import UserError

__all__ = ["CODE_KEYS", "CheckpointFiles", "read_json", "sanitized"]

_MAX_CONFIG_BYTES = 8 << 20
_MAX_INDEX_BYTES = 64 << 20
_MAX_ENTRIES = 2_000_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CODE_KEYS = frozenset(
    {"auto_map", "trust_remote_code", "_attn_implementation", "_attn_implementation_internal", "attn_implementation",
     "_experts_implementation", "experts_implementation", "kernel_config", "use_kernels", "custom_pipelines"}
)  # fmt: skip
"""Config keys that can make transformers fetch or run code; `sanitized` drops them."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """A checked checkpoint folder.

    Attributes:
        folder: absolute.
        config: config.json as it is (multimodal configs keep their ``text_config`` inside).
        shards: file name -> header, sorted by name.
        tensors: tensor name -> (file name, place).
        notes: what was ignored ("the config names custom code (auto_map); it is not run").
    """

    folder: Path
    config: dict[str, Any]
    shards: dict[str, Header]
    tensors: dict[str, tuple[str, TensorInfo]]
    notes: tuple[str, ...]

    @classmethod
    def open(cls, folder: str | Path) -> CheckpointFiles:
        """Check config.json, the shard index and every shard's header.

        Raises:
            UserError: the folder or a file is missing or malformed, a shard lies outside the folder, a tensor is
                missing from its shard or lies in two, the weights are pickles.
        """
        root = Path(folder).expanduser().absolute()
        if not root.is_dir():
            raise UserError(f"there is no checkpoint folder {root}", found="a file" if root.exists() else "nothing",
                            fix="give the folder that holds config.json and *.safetensors, or a .gguf file")  # fmt: skip
        config = read_json(_inside(root, "config.json"), _MAX_CONFIG_BYTES)
        names, weight_map = _shard_names(root)
        shards = {name: read_header(_inside(root, name)) for name in names}
        tensors: dict[str, tuple[str, TensorInfo]] = {}
        for name, header in shards.items():
            for key, info in header.tensors.items():
                if key in tensors:
                    raise UserError(f"tensor {key!r} is in two shards", found=f"{tensors[key][0]} and {name}",
                                    fix="download the checkpoint again into an empty folder")  # fmt: skip
                tensors[key] = (name, info)
        if weight_map is not None:
            _check_map(weight_map, tensors)
        if not tensors:
            raise UserError("the checkpoint holds no tensors", found=", ".join(names))
        return cls(root, config, shards, tensors, tuple(_notes(root, config, names)))

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config: ``text_config`` of multimodal models, else the whole."""
        for key in ("text_config", "llm_config", "language_config"):
            if isinstance(self.config.get(key), dict):
                return self.config[key]
        return self.config


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a small file.

    Raises:
        UserError: missing, larger than ``limit`` bytes, not JSON, not an object.
    """
    with os.fdopen(open_regular(path), "rb") as f:
        raw = f.read(limit + 1)
    if len(raw) > limit:
        raise UserError(f"{path.name} is too large", found=f"more than {limit} bytes")
    if (entries := raw.count(b",")) > _MAX_ENTRIES:
        raise UserError(f"{path.name} has too many entries to be read safely", found=f"about {entries}")
    try:
        data = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as e:
        raise UserError(
            f"{path.name} is not JSON", found=str(e)[:120], fix="download the file again"
        ) from None
    if not isinstance(data, dict):
        raise UserError(f"{path.name} is not a JSON object", found=type(data).__name__)
    return data


def sanitized(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of the config without `CODE_KEYS`, nested configs included."""
    return {
        k: sanitized(v) if isinstance(v, dict) else v
        for k, v in config.items()
        if k not in CODE_KEYS
    }  # fmt: skip


def _inside(root: Path, name: str) -> Path:
    """``root/name`` when it really lies in the folder; links may lead to the same repository's ``blobs/``."""
    path = root / name
    if not os.path.lexists(path):
        raise UserError(f"{name} is missing", found=f"no such file in {root}",
                        fix="download the checkpoint again, or name the folder that holds it")  # fmt: skip
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    allowed = [home]
    # A hub cache is models--a--b/snapshots/<revision>/file -> models--a--b/blobs/<hash>.
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(a) for a in allowed):
        raise UserError(f"{name} is a link that leaves the checkpoint folder", found=str(real),
                        fix="copy the file into the folder if you trust it")  # fmt: skip
    return path


def _shard_names(root: Path) -> tuple[list[str], dict[str, str] | None]:
    """File names of the shards, and the index's weight map (None for a single file). transformers' order of choice."""
    if os.path.lexists(root / _SINGLE):
        return [_SINGLE], None
    if os.path.lexists(root / _INDEX):
        weight_map = read_json(_inside(root, _INDEX), _MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{_INDEX} has no weight_map", found=str(weight_map)[:80])
        for key, name in weight_map.items():
            plain = isinstance(name, str) and name.endswith(".safetensors") and name.isprintable()
            if not plain or set("/\\:") & set(name) or name.startswith("."):
                raise UserError(
                    f"{_INDEX} names a shard that is not a plain file name in the folder",
                    found=f"{key!r} is said to be in {str(name)[:120]!r}", fix="do not trust this checkpoint",
                )  # fmt: skip
        return sorted(set(weight_map.values())), weight_map
    found = sorted(p.name for p in root.iterdir())
    lone = [n for n in found if n.endswith(".safetensors")]
    if len(lone) == 1:
        return lone, None
    pickles = [n for n in found if n.endswith(_PICKLES)]
    if pickles and not lone:
        raise UserError(
            "the weights are Python pickles, which can run code when they are read; they are not opened",
            found=", ".join(pickles[:4]),
            fix="take the repository's safetensors version, or convert in a sandbox: load it there with "
            "torch.load(..., weights_only=True) and write it with safetensors.torch.save_file",
        )
    if lone:
        raise UserError(f"there are {len(lone)} shards but no {_INDEX}", found=", ".join(lone[:4]),
                        fix="download the index too")  # fmt: skip
    ggufs = [n for n in found if n.endswith(".gguf")]
    raise UserError("the folder holds no safetensors weights", found=", ".join(found[:8]) or "an empty folder",
                    fix=f"give the file itself: {root / ggufs[0]}" if ggufs else "name another folder")  # fmt: skip


def _check_map(weight_map: dict[str, str], tensors: dict[str, tuple[str, TensorInfo]]) -> None:
    """Every key of the index in the shard it names, every tensor of the shards in the index."""
    for key, name in weight_map.items():
        if key not in tensors or tensors[key][0] != name:
            actual = f"it is in {tensors[key][0]}" if key in tensors else "no shard has it"
            raise UserError(f"tensor {key!r} is not in {name}, where the index says it is", found=actual,
                            fix="download the checkpoint again")  # fmt: skip
    extra = tensors.keys() - weight_map.keys()
    if extra:
        raise UserError(f"{len(extra)} tensors are in the shards but not in the index", found=repr(min(extra)),
                        fix="the shards belong to another version; download the checkpoint again")  # fmt: skip


def _notes(root: Path, config: dict[str, Any], names: list[str]) -> list[str]:
    """What was seen and not used."""
    notes = []
    code = [k for k in config if k in CODE_KEYS]
    if code:
        notes.append(
            f"the config names custom code or kernels ({', '.join(sorted(code))}); ignored, never run"
        )
    unused = [
        p.name for p in root.iterdir() if p.name.endswith((*_PICKLES, ".safetensors")) and p.name not in names
    ]
    if unused:
        notes.append(f"not read: {', '.join(sorted(unused)[:6])}{' ...' if len(unused) > 6 else ''}")
    return notes
