"""GGUF: the index names what the import writes, the import is the same function, hostile files are refused cheaply."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitatlas.analysis.gguf_header import GGML_TYPES, GgufArray, read_gguf_header
from bitatlas.analysis.gguf_import import _sweep, convert, import_gguf
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.kernels.errors import UserError

ARCHS = {"llama": "llama", "llama_tied": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3",
         "gpt2": "gpt2", "qwen3_moe": "qwen3moe", "mistral": "llama"}  # fmt: skip


def llama_cpp_rows(weight, heads):
    """llama.cpp keeps the two halves of each rotary pair side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(source, path, arch, quantize=False):
    """A GGUF of a tiny checkpoint, by the gguf package and its own table of names."""
    config = json.loads((source / "config.json").read_text())
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    heads = config.get("num_attention_heads", config.get("n_head"))
    kv_heads = config.get("num_key_value_heads", heads)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(config.get("hidden_size", config.get("n_embd")))
    writer.add_feed_forward_length(config.get("intermediate_size", config.get("n_inner")))
    writer.add_head_count(heads)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_rope_freq_base(1e4)
    if arch == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    if arch == "qwen3moe":
        writer.add_expert_count(config.get("num_experts", config.get("num_local_experts")))
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    vocab = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get) + ["!!", *(f"<pad{i}>" for i in range(299 - len(vocab)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    # The reader wants one merge at least, and its result has to be a token.
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], layers)
    state = load_file(source / "model.safetensors")
    stacks = {}
    for name, tensor in state.items():
        stem, suffix = name.rsplit(".", 1)
        tensor = tensor.float()
        if ".experts." in name:
            head, _, tail = stem.partition(".experts.")
            e, proj = tail.split(".")
            stacks.setdefault(f"{head}.experts.{proj}", {})[int(e)] = tensor
            continue
        if arch == "llama" and "q_proj" in name:
            tensor = llama_cpp_rows(tensor, heads)
        if arch == "llama" and "k_proj" in name:
            tensor = llama_cpp_rows(tensor, kv_heads)
        if arch == "gemma3" and "norm" in name:
            tensor = tensor + 1
        if arch == "gpt2" and any(c in stem for c in ("c_attn", "c_proj", "c_fc")) and tensor.dim() == 2:
            tensor = tensor.T
        add(writer, f"{names.get_name(stem)}.{suffix}", tensor, quantize)
    for stem, stack in stacks.items():
        add(
            writer, f"{names.get_name(stem)}.weight", torch.stack([stack[e] for e in sorted(stack)]), quantize
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, name, tensor, quantize):
    data = np.ascontiguousarray(tensor.numpy())
    if quantize and data.ndim == 2 and data.shape[1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, data)


@pytest.mark.parametrize("family", ARCHS)
def test_index_equals_the_checkpoints(tiny_checkpoint, tmp_path, family):
    """Unit names, roles and shapes as in the checkpoint that the GGUF was made from."""
    path = write_gguf(tiny_checkpoint(family), tmp_path / "x.gguf", ARCHS[family])
    got, want = index_model(path), index_model(tiny_checkpoint(family))
    assert [(u.key, u.role, u.expert, u.rows, u.cols, u.transposed) for u in got.units] == [
        (u.key, u.role, u.expert, u.rows, u.cols, u.transposed) for u in want.units
    ]
    assert {(k.name, k.shape) for k in got.kept} == {(k.name, k.shape) for k in want.kept}
    assert got.source == "gguf"
    assert (got.n_layers, got.n_experts, got.top_k, got.vocab_size) == (
        want.n_layers, want.n_experts, want.top_k, want.vocab_size)  # fmt: skip
    assert got.kv is not None
    assert want.kv is not None
    assert (got.kv.heads, got.kv.head_dim) == (want.kv.heads, want.kv.head_dim)


def check_import(source, path, folder):
    index = index_model(folder)
    assert [(u.key, u.rows, u.cols) for u in index.units] == [
        (u.key, u.rows, u.cols) for u in index_model(path).units
    ]
    got, want = LoadedModel.open(index), LoadedModel.open(index_model(source))
    for u in index.units:
        assert torch.equal(got.handle(u.key).get(), want.handle(u.key).get().bfloat16().float()), u.key
    for (name, a), (_, b) in zip(got.model.named_parameters(), want.model.named_parameters()):
        assert torch.equal(a, b.bfloat16().float()), name
    return got


def test_import(tiny_checkpoint, tmp_path):
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "x.gguf", "llama")
    folder = import_gguf(path, tmp_path / "models" / "x")
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["x"]
    loaded = check_import(tiny_checkpoint("llama"), path, folder)
    text = "Was it you?"
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert (
        str(tmp_path)
        not in (folder / "config.json").read_text() + (folder / "tokenizer_config.json").read_text()
    )
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert import_gguf(path, folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("family", [f for f in ARCHS if f != "llama"])
def test_conversion_of_other_families(tiny_checkpoint, tmp_path, family):
    """What the child process does, in this one: starting it takes longer than all the conversions."""
    (tmp_path / "source").mkdir()
    path = write_gguf(tiny_checkpoint(family), tmp_path / "source" / "model.gguf", ARCHS[family])
    convert(path.parent, tmp_path / "out")
    check_import(tiny_checkpoint(family), path, tmp_path / "out")


def test_quantised_source_is_noted(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("llama", hidden_size=32)
    index = index_model(write_gguf(source, tmp_path / "q.gguf", "llama", quantize=True))
    assert any("already quantised (Q8_0)" in n for n in index.notes)
    plain = index_model(write_gguf(source, tmp_path / "f.gguf", "llama"))
    assert not any("already quantised" in n for n in plain.notes)
    assert index.digest != plain.digest


@pytest.mark.slow
def test_a_failed_import_leaves_nothing(tiny_checkpoint, tmp_path):
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "x.gguf", "llama")
    raw = path.read_bytes()
    # Same length, another name: the layer's weight is gone.
    path.write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight"))
    with pytest.raises(UserError, match="could not be imported.*no value in the GGUF"):
        import_gguf(path, tmp_path / "models" / "x")
    assert list((tmp_path / "models").iterdir()) == []


def test_left_overs_of_killed_imports_are_swept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone, alive = tmp_path / f".x.{dead.pid}.abc.tmp", tmp_path / f".x.{os.getpid()}.abc.tmp"
    other = tmp_path / f".y.{dead.pid}.abc.tmp"
    for folder in (gone, alive, other):
        folder.mkdir()
    (gone / "half.safetensors").write_bytes(b"x")
    _sweep(tmp_path / "x")
    assert sorted(tmp_path.iterdir()) == sorted([alive, other])


def test_two_imports_at_once(tiny_checkpoint, tmp_path, monkeypatch):
    """The second finds a complete folder where it wanted to put its own, and takes that."""
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "x.gguf", "llama")
    out = tmp_path / "models" / "x"

    def child(path, work):
        shutil.copytree(tiny_checkpoint("llama"), work / "out")
        shutil.copytree(tiny_checkpoint("llama"), out)

    monkeypatch.setattr("bitatlas.analysis.gguf_import._run_child", child)
    assert import_gguf(path, out) == out
    assert list(out.parent.iterdir()) == [out]


def test_folder_that_cannot_be_written(tiny_checkpoint, tmp_path):
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "x.gguf", "llama")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be imported"):
        import_gguf(path, tmp_path / "file" / "x")


def test_types_are_those_of_the_package():
    theirs = {int(t): (t.name, *gguf.constants.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType
              if t in gguf.constants.GGML_QUANT_SIZES}  # fmt: skip
    assert theirs.items() <= GGML_TYPES.items()


def test_header_without_torch_or_gguf(tiny_checkpoint, tmp_path):
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "x.gguf", "llama")
    code = (
        "import sys\nfrom bitatlas.analysis.model_index import index_model\n"
        "print(len(index_model(sys.argv[1]).units))\n"
        "assert not {'torch', 'gguf', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("16", "")


def test_header_against_the_package(tiny_checkpoint, tmp_path):
    path = write_gguf(tiny_checkpoint("llama"), tmp_path / "x.gguf", "llama")
    header, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    assert {
        t.name: (tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes) for t in theirs.tensors
    } == {t.name: (t.shape, t.start, t.end - t.start) for t in header.tensors.values()}
    assert header.metadata["llama.block_count"] == 2
    assert header.metadata["tokenizer.ggml.tokens"][0] == "<eos>"


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def make(tensors=(), keys=b"", n_tensors=None, n_keys=0, version=3, magic=b"GGUF", data=b""):
    """GGUF bytes by hand: tensors are (name, dims, type, offset)."""
    infos = b"".join(
        text(n)
        + struct.pack("<I", len(d))
        + b"".join(struct.pack("<Q", x) for x in d)
        + struct.pack("<IQ", t, o)
        for n, d, t, o in tensors
    )
    count = len(tensors) if n_tensors is None else n_tensors
    head = magic + struct.pack("<IQQ", version, count, n_keys) + keys + infos
    return head + b"\0" * (-len(head) % 32) + data


def scalar(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def array(key, kind, length, body=b""):
    return text(key) + struct.pack("<IIQ", 9, kind, length) + body


GOOD = [("a", (4, 2), 0, 0)]
HOSTILE = {
    "empty": (b"", "truncated"),
    "magic": (make(magic=b"GGML"), "not a GGUF"),
    "version 1": (make(version=1), "version"),
    "version 99": (make(version=99), "version"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "43 bytes, 2^60 keys": (make(n_keys=1 << 60).ljust(43, b"\0")[:43], "too many"),
    "2^63 tensors": (make(n_tensors=1 << 63), "too many"),
    "more tensors than there are": (make(GOOD, n_tensors=2, data=b"x" * 32), ""),
    "no tensors": (make(), "no tensors"),
    "long key": (make(keys=struct.pack("<Q", 1 << 40), n_keys=1), "safely"),
    "wrapping key": (make(keys=struct.pack("<Q", (1 << 64) - 8), n_keys=1), "safely"),
    "string beyond the file": (make(keys=scalar("k", 8, struct.pack("<Q", 1 << 19)), n_keys=1), "truncated"),
    "value type": (make(keys=scalar("k", 77, b""), n_keys=1), "unknown type"),
    "huge array": (make(keys=array("k", 4, 1 << 61), n_keys=1), "array"),
    "array beyond the file": (make(keys=array("k", 4, 1 << 20), n_keys=1), "truncated"),
    "array of arrays": (make(keys=array("k", 9, 5), n_keys=1), "array"),
    "array type": (make(keys=array("k", 55, 5000), n_keys=1), "unknown type"),
    "key twice": (make(keys=scalar("k", 0, b"a") * 2, n_keys=2), "twice"),
    "no dimensions": (make([("a", (), 0, 0)], data=b"x" * 32), "number of dimensions"),
    "5 dimensions": (make([("a", (1,) * 5, 0, 0)], data=b"x" * 32), "number of dimensions"),
    "zero dimension": (make([("a", (0, 4), 0, 0)], data=b"x" * 32), "impossible dimensions"),
    "wrapping dimensions": (make([("a", (1 << 32, 1 << 32), 0, 0)], data=b"x" * 32), "impossible dimensions"),
    "2^63": (make([("a", (1 << 63,), 0, 0)], data=b"x" * 32), "impossible dimensions"),
    "half a block": (make([("a", (33,), 8, 0)], data=b"x" * 64), "impossible dimensions"),
    "tensor type": (make([("a", (4,), 4242, 0)], data=b"x" * 32), "ggml type 4242"),
    "misaligned": (make([("a", (4, 2), 0, 4)], data=b"x" * 64), "misaligned"),
    "offset outside": (make([("a", (4, 2), 0, 1 << 62)], data=b"x" * 32), "leaves the file"),
    "truncated data": (make(GOOD, data=b"x" * 31), "leaves the file"),
    "overlap": (make([("a", (8, 2), 0, 0), ("b", (4, 2), 0, 32)], data=b"x" * 64), "overlaps"),
    "tensor twice": (make([("a", (4, 2), 0, 0), ("a", (4, 2), 0, 32)], data=b"x" * 64), "twice"),
    "alignment 3": (make(GOOD, scalar("general.alignment", 4, struct.pack("<I", 3)), n_keys=1, data=b"x" * 64), "alignment"),
    "alignment 0": (make(GOOD, scalar("general.alignment", 4, struct.pack("<I", 0)), n_keys=1, data=b"x" * 64), "alignment"),
    "alignment text": (make(GOOD, scalar("general.alignment", 8, text("x")), n_keys=1, data=b"x" * 64), "alignment"),
    "strings without end": (make(keys=array("k", 8, 1 << 21, b"\0" * (1 << 20)), n_keys=1), "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(tmp_path, case):
    raw, words = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(UserError, match="bad.gguf") as caught:
        index_model(path)
    assert words in str(caught.value)
    with pytest.raises(UserError):
        import_gguf(path, tmp_path / "out" / "x")
    assert not (tmp_path / "out").exists()


def test_the_handmade_good_one_is_good(tmp_path):
    keys = array("k", 8, 2000, text("ab") * 2000) + array("f", 6, 2, struct.pack("<ff", 1, 2))
    (tmp_path / "x.gguf").write_bytes(make(GOOD, keys, n_keys=2, data=b"x" * 32))
    header = read_gguf_header(tmp_path / "x.gguf")
    assert header.tensors["a"].shape == (2, 4)
    assert header.metadata == {"k": GgufArray(2000), "f": [1.0, 2.0]}


def test_cut_anywhere(tiny_checkpoint, tmp_path):
    raw = write_gguf(tiny_checkpoint("llama"), tmp_path / "x.gguf", "llama").read_bytes()
    header_end = min(t.start for t in read_gguf_header(tmp_path / "x.gguf").tensors.values())
    for size in [*range(0, header_end, 97), header_end, len(raw) - 1]:
        (tmp_path / "cut.gguf").write_bytes(raw[:size])
        with pytest.raises(UserError):
            read_gguf_header(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("arch", "extra"), [("mamba", b""), ("llama", scalar("llama.expert_count", 4, struct.pack("<I", 8)))]
)
def test_architectures_that_cannot_be_imported(tmp_path, arch, extra):
    keys = scalar("general.architecture", 8, text(arch)) + extra
    (tmp_path / "x.gguf").write_bytes(make(GOOD, keys, n_keys=1 + bool(extra), data=b"x" * 32))
    with pytest.raises(UserError, match="cannot be imported"):
        index_model(tmp_path / "x.gguf")
