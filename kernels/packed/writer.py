"""Writes a packed checkpoint: shard by shard, each whole or not there, ``bitatlas.json`` last.

The plan (which tensor, which format, which shard) is known before the first byte, because formats count their bytes
exactly. It lies in the folder as ``bitatlas.json.partial`` while shards are missing; packing the same again finds it,
skips the shards that are there, and goes on. Shards may be written in any order and by several processes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.packed.manifest import MANIFEST, PARTIAL, Manifest, PackedKept, PackedUnit, shard_name
from bitatlas.kernels.packed.matrix import packed_tensors
from bitatlas.kernels.packed.shards import DTYPES, ShardReader, TensorSpec, write_shard

__all__ = ["PackedWriter", "check_folder", "copy_side_files", "kept_spec", "unit_specs", "write_text"]

_COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip
_NOT_OURS = ("auto_map", "quantization_config")  # foreign code and the format the weights had before
_MAX_COPY = 512 << 20


def unit_specs(unit: PackedUnit) -> list[TensorSpec]:
    """The tensors that a unit is stored as."""
    tensors = packed_tensors(unit.fmt, unit.rows, unit.cols)
    return [TensorSpec(f"{unit.key}.{part}", dtype, shape) for part, (dtype, shape) in tensors.items()]


def kept_spec(kept: PackedKept) -> TensorSpec:
    """The tensor that a kept one is stored as.

    Raises:
        UserError: a dtype that is not stored.
    """
    if kept.dtype not in DTYPES:
        raise UserError(f"the tensor {kept.name} has a dtype that cannot be stored", found=kept.dtype)
    return TensorSpec(kept.name, DTYPES[kept.dtype], kept.shape)


class PackedWriter:
    """A packed checkpoint in the making.

    Args:
        out: the folder; made if need be.
        manifest: the plan.
        source: the original checkpoint's folder: its config, tokenizer and licence are copied.
        extra: more text files to lay beside them, name -> text.

    Raises:
        UserError: the folder holds something else, cannot be written, or the disk is too small.
    """

    def __init__(
        self, out: Path, manifest: Manifest, source: Path, extra: Mapping[str, str] | None = None
    ) -> None:
        self.out, self.manifest = Path(out), manifest
        self._extra = dict(extra or {})
        self.specs: list[list[TensorSpec]] = [[] for _ in manifest.shards]
        for u in manifest.units:
            self.specs[u.shard] += unit_specs(u)
        for k in manifest.kept:
            self.specs[k.shard].append(kept_spec(k))
        self._text = manifest.to_json()
        self._claim(source)

    def _claim(self, source: Path) -> None:
        """Make the folder ours, or find that it is."""
        if name := check_folder(self.out):
            if (self.out / name).read_text(encoding="utf-8") == self._text:
                return
            raise UserError(f"{self.out} holds another packed model", found=f"a {name} with other contents",
                            fix="name an empty folder, or remove this one first")  # fmt: skip
        made = not self.out.exists()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._check_space()
            copy_side_files(source, self.out)
            for name, text in self._extra.items():
                write_text(self.out / name, text)
            write_text(self.out / PARTIAL, self._text)
        except (OSError, UserError) as e:
            for path in self.out.iterdir() if self.out.is_dir() else ():
                path.unlink()
            if made and self.out.is_dir():
                self.out.rmdir()
            if isinstance(e, UserError):
                raise
            raise UserError(f"{self.out} cannot be written", found=str(e.strerror or e),
                            fix="name a folder on a disk with space that you may write to") from None  # fmt: skip

    def _check_space(self) -> None:
        need, free = sum(self.manifest.shards), shutil.disk_usage(self.out).free
        if need > free:
            raise UserError("the disk is too small for the packed model", found=f"{free} bytes free, {need} needed",
                            fix="free some space, name a folder on another disk, or solve for fewer bits")  # fmt: skip

    def pending(self) -> list[int]:
        """Shards that are not there yet."""
        return [i for i in range(len(self.specs)) if not self.is_written(i)]

    def is_written(self, number: int) -> bool:
        """Whether a shard is there. One that is there but not sound counts as missing."""
        path = self.out / shard_name(number)
        if not path.is_file():
            return False
        try:
            with ShardReader(path) as shard:
                shard.expect(self.specs[number])
        except UserError:
            return False
        return True

    def write(
        self,
        number: int,
        pack: Callable[[PackedUnit], Mapping[str, Tensor]],
        keep: Callable[[PackedKept], Tensor],
    ) -> int:
        """Write shard ``number``; ``pack`` gives a unit's stored tensors, ``keep`` a kept one. Returns file bytes.

        Raises:
            UserError: the disk is full; nothing but finished shards is left.
        """

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for k in self.manifest.kept:
                if k.shard == number:
                    yield k.name, keep(k)
            for u in self.manifest.units:
                if u.shard == number:
                    for part, tensor in pack(u).items():
                        yield f"{u.key}.{part}", tensor

        return write_shard(self.out / shard_name(number), self.specs[number], tensors())

    def finish(self) -> Path:
        """Give the manifest its name. Every shard must be there; may be called again.

        Raises:
            ValueError: shards are missing.
        """
        if missing := self.pending():
            raise ValueError(f"shards {missing[:5]} are missing")
        if (self.out / PARTIAL).exists():
            os.replace(self.out / PARTIAL, self.out / MANIFEST)
        return self.out


def check_folder(out: Path) -> str:
    """Name of the manifest in ``out``, finished or not; "" for a folder that is empty or does not exist.

    Raises:
        UserError: the folder holds something else, or is a file.
    """
    found = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    for name in (MANIFEST, PARTIAL):
        if name in found:
            return name
    if found or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is not an empty folder", found=", ".join(found[:4]) or "a file",
                        fix="name a folder that is empty or does not exist")  # fmt: skip
    return ""


def copy_side_files(source: Path, out: Path, changes: Mapping[str, object] | None = None) -> None:
    """config.json without foreign code and old quantisation (``changes`` put in), tokenizer, generation settings, licence."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    clean = {k: v for k, v in config.items() if k not in _NOT_OURS} | dict(changes or {})
    write_text(out / "config.json", json.dumps(clean, indent=2) + "\n")
    for name in _COPIED:
        path = source / name
        if path.is_file() and path.stat().st_size <= _MAX_COPY:
            tmp = out / (name + ".tmp")
            shutil.copyfile(path, tmp)
            os.replace(tmp, out / name)


def write_text(path: Path, text: str) -> None:
    """Write a small file: whole, on disk, or not at all."""
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)
