"""Headers: what is good is read as the library reads it, what is bad is refused quickly and small."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bitatlas.analysis.safetensors_header import DTYPE_BITS, read_header
from bitatlas.analysis.weights import TORCH_DTYPES
from bitatlas.kernels.errors import UserError


def raw_file(path, header, data=b""):
    """A file with this header (an object, or bytes as they are)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_library_reads(tmp_path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.tensor(1),
        "e": torch.zeros(0, 4), "ü/../x": torch.ones(3, dtype=torch.float8_e4m3fn),
    }  # fmt: skip
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.file_size == path.stat().st_size
    raw = path.read_bytes()
    with safe_open(path, "pt") as f:
        assert set(header.tensors) == set(f.keys())
        for name, info in header.tensors.items():
            assert list(info.shape) == f.get_slice(name).get_shape()
            assert info.dtype == f.get_slice(name).get_dtype()
            stored = raw[info.start : info.end]
            assert stored == tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_an_empty_file_of_tensors_is_fine(tmp_path):
    assert read_header(raw_file(tmp_path / "m.safetensors", {})).tensors == {}


def test_every_dtype_with_whole_bytes_has_a_torch_type():
    whole = {name for name, bits in DTYPE_BITS.items() if bits % 8 == 0}
    assert whole == set(TORCH_DTYPES)
    assert all(DTYPE_BITS[n] == 8 * torch.empty(0, dtype=t).element_size() for n, t in TORCH_DTYPES.items())


DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000
MALFORMED = {
    "not json": (b"{nope", b"", "not JSON"),
    "not utf-8": (b"\xff\xfe{}", b"", "not JSON"),
    "a list": ([], b"", "not a JSON object"),
    "deep nesting": (b"[" * 100_000, b"", "not JSON"),
    "deep objects": (DEEP, b"", ""),
    "metadata not strings": ({"__metadata__": {"a": 1}}, b"", "metadata"),
    "duplicate tensor": (b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"x" * 8, "twice"),
    "duplicate field": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b"x" * 8,
        "twice",
    ),
    "unknown dtype": ({"a": entry("F7")}, b"x" * 8, "dtype"),
    "dtype not text": ({"a": entry(3)}, b"x" * 8, "dtype"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8, "lacks"),
    "extra field": ({"a": entry() | {"x": 1}}, b"x" * 8, "lacks"),
    "entry not an object": ({"a": 7}, b"", "lacks"),
    "negative shape": ({"a": entry(shape=(-2,))}, b"x" * 8, "shape"),
    "boolean shape": ({"a": entry(shape=(True, 2))}, b"x" * 8, "shape"),
    "float shape": ({"a": entry(shape=(2.0,))}, b"x" * 8, "shape"),
    "nine dimensions": ({"a": entry(shape=(1,) * 8 + (2,))}, b"x" * 8, "shape"),
    "shape overflow": ({"a": entry(shape=(1 << 33, 1 << 33))}, b"x" * 8, "disagree"),
    "shape against bytes": ({"a": entry(shape=(3,))}, b"x" * 8, "disagree"),
    "reversed offsets": ({"a": entry(offsets=(8, 0))}, b"x" * 8, "disagree"),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, b"x" * 8, "offsets"),
    "huge offsets": ({"a": entry(offsets=(1 << 63, (1 << 63) + 8))}, b"x" * 8, "offsets"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, b"x" * 8, "offsets"),
    "truncated data": ({"a": entry()}, b"x" * 7, "truncated"),
    "trailing bytes": ({"a": entry()}, b"x" * 9, "after its last tensor"),
    "trailing bytes, no tensor": ({}, b"x", "after its last tensor"),
    "gap": ({"a": entry(offsets=(4, 12))}, b"x" * 12, "gap"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, b"x" * 12, "overlap"),
    "same bytes twice": ({"a": entry(), "b": entry()}, b"x" * 8, "overlap"),
    "half a byte": ({"a": entry("F4", (3,), (0, 1))}, b"x", "disagree"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(tmp_path, case):
    header, data, words = MALFORMED[case]
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    begun = time.process_time()
    with pytest.raises(UserError, match="bad.safetensors") as caught:
        read_header(path)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600
    assert time.process_time() - begun < 1


@pytest.mark.parametrize("size", [0, 1, 7])
def test_no_room_for_the_length(tmp_path, size):
    (tmp_path / "m.safetensors").write_bytes(b"\0" * size)
    with pytest.raises(UserError, match="truncated"):
        read_header(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("length", "words"), [(1000, "truncated"), (1 << 40, "too large"), ((1 << 64) - 1, "too large")]
)
def test_length_beyond_the_file(tmp_path, length, words):
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(UserError, match=words):
        read_header(tmp_path / "m.safetensors")


def test_a_good_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.ones(7)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            read_header(path)


BOMBS = {
    "many tensors": b"{" + b",".join(b'"%x":{"dtype":"F32","shape":[],"data_offsets":[0,0]}' % i for i in range(300_000)) + b"}",
    "many strings": b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(2_000_000)) + b"}}",
    "many numbers": b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b"0," * 10_000_000 + b"0]}}",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_cost_neither_time_nor_memory(tmp_path, bomb):
    path = raw_file(tmp_path / "bomb.safetensors", BOMBS[bomb])
    code = (
        "import resource, sys, time\n"
        "from bitatlas.analysis.safetensors_header import read_header\n"
        "from bitatlas.kernels.errors import UserError\n"
        "before = time.process_time()\n"
        "try:\n    read_header(sys.argv[1])\n"
        "except UserError as e:\n    print(time.process_time() - before, e)\n"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 0, done.stderr
    assert "safely" in done.stdout
    assert float(done.stdout.split()[0]) < 1


def test_the_header_size_limit_holds_before_reading(tmp_path):
    path = tmp_path / "m.safetensors"
    with path.open("wb") as f:
        f.write(struct.pack("<Q", 33 << 20))
        f.truncate(40 << 20)
    with pytest.raises(UserError, match="too large"):
        read_header(path)


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.safetensors")
    for path in (tmp_path / "fifo.safetensors", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            read_header(path)
    with pytest.raises(UserError, match="cannot be opened"):
        read_header(tmp_path / "absent.safetensors")
