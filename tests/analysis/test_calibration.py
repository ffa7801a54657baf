from __future__ import annotations

import json

import numpy as np
import pytest

from bitatlas.analysis.calibration import (
    CalibrationSet,
    check_disjoint,
    load_text,
    load_tokenizer,
    make_calibration,
    shared_windows,
)
from bitatlas.kernels.errors import UserError


class Characters:
    """One token a character, ids from 3; the interface of a transformers tokenizer that is used."""

    eos_token_id = 2

    def __init__(self, bos: bool = False) -> None:
        self.bos_token_id = 1
        self._bos = bos

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        ids = [3 + ord(c) % 200 for c in text]
        return {"input_ids": [1, *ids] if add_special_tokens and self._bos else ids}


@pytest.fixture
def book(tmp_path):
    rng = np.random.default_rng(3)
    text = "\n".join("".join(rng.choice(list("abcdefgh ij"), 60)) for _ in range(100))
    path = tmp_path / "book.txt"
    path.write_text(text)
    return path


def test_sequences_are_runs_of_the_text_and_spread_over_it(book):
    found = make_calibration(Characters(), book, 500, 50, seed=1)
    assert found.tokens.shape == (10, 50)
    assert found.tokens.dtype == np.int64
    stream = Characters()(book.read_text())["input_ids"]
    starts = []
    for row in found.tokens:
        places = [i for i in range(0, len(stream), 50) if stream[i : i + 50] == row.tolist()]
        assert len(places) == 1
        starts.append(places[0])
    tenth = len(stream) // 10
    assert [s // tenth for s in starts] == sorted(s // tenth for s in starts)
    assert starts[0] < 2 * tenth
    assert starts[-1] > 8 * tenth - 50


def test_the_seed_decides(book):
    one, same, other = (make_calibration(Characters(), book, 500, 50, seed=s) for s in (1, 1, 2))
    assert one.digest == same.digest
    assert np.array_equal(one.tokens, same.tokens)
    assert one.digest != other.digest
    assert not np.array_equal(one.tokens, other.tokens)


def test_the_digest_knows_ids_and_settings():
    ids = np.arange(6).reshape(2, 3)
    assert CalibrationSet.of(ids).digest != CalibrationSet.of(ids.reshape(3, 2)).digest
    assert CalibrationSet.of(ids).digest != CalibrationSet.of(ids, settings={"mode": "packed"}).digest
    assert CalibrationSet.of(ids, "a.txt").digest == CalibrationSet.of(ids, "b.txt").digest


def test_tokens_are_rounded_up_to_sequences(book):
    assert make_calibration(Characters(), book, 101, 50).tokens.shape == (3, 50)


def test_bos_opens_every_sequence_where_the_tokenizer_does_so(book):
    found = make_calibration(Characters(bos=True), book, 500, 50)
    assert (found.tokens[:, 0] == 1).all()
    assert (found.tokens[:, 1:] != 1).all()
    assert found.tokens.shape == (10, 50)


def test_documents_are_joined_by_the_end_token_and_read_in_order(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in ("aaaa", "bbbb", "cc")) + "\n")
    found = make_calibration(Characters(), path, 12, 12)
    a, b, c = (3 + ord(x) % 200 for x in "abc")
    assert found.tokens.tolist() == [[a] * 4 + [2] + [b] * 4 + [2] + [c] * 2]


def test_document_mode_takes_beginnings_of_long_documents_only(tmp_path):
    path = tmp_path / "d.jsonl"
    texts = ["short", "a long document", "another long one", "tiny"]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    found = make_calibration(Characters(), path, 20, 10, mode="document")
    assert found.tokens.tolist() == [[3 + ord(c) % 200 for c in t[:10]] for t in texts[1:3]]
    with pytest.raises(UserError, match="2 of them with at least 10 tokens .the longest has 16."):
        make_calibration(Characters(), path, 30, 10, mode="document")


def test_too_short_says_how_many_there_are_and_how_many_are_needed(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("x" * 130)
    with pytest.raises(
        UserError, match=r"4 sequences of 50 tokens are needed \(200 tokens\).*130 tokens = 2 seq"
    ):
        make_calibration(Characters(), path, 200, 50)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\n ", "empty"),
        ("a.txt", b"abc\0def", "zero byte at offset 3"),
        ("a.txt", b"caf\xe9 au lait", r"byte 0xe9 at offset 3"),
        ("a.txt", b"\xff\xfea\0", "UTF-16"),
        ("a.safetensors", b"GGUF\3\0", "a GGUF model"),
        ("a.txt", b"\x1f\x8b\x08rest", "gzip"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1: body"),
        ("a.jsonl", b'["x"]\n', "line 1: list"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: text"),
        ("a.jsonl", b'{"text": ""}\n', "no line"),
    ],
)
def test_wrong_files_get_one_clear_error(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_text(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_text(tmp_path / "none.txt")
    with pytest.raises(UserError, match="is a folder"):
        load_text(tmp_path)


def test_byte_order_mark_and_umlauts_are_read(tmp_path):
    path = tmp_path / "u.txt"
    path.write_bytes("\ufeffgrüße".encode())
    assert load_text(path) == ["grüße"]


def test_large_text_is_sampled_in_whole_lines_over_its_length(tmp_path):
    path = tmp_path / "big.jsonl"
    with path.open("w") as handle:
        for i in range(40000):
            handle.write(json.dumps({"text": f"zeile {i:06d} äöü"}) + "\n")
    documents = load_text(path, max_bytes=200_000)
    numbers = [int(d.split()[1]) for d in documents]
    assert sum(len(d) for d in documents) < 200_000
    assert numbers == sorted(set(numbers))
    assert numbers[0] < 1000
    assert numbers[-1] > 39000
    assert documents == load_text(path, max_bytes=200_000)
    assert documents != load_text(path, max_bytes=200_000, seed=1)


def test_avoided_text_is_not_drawn(book):
    first = make_calibration(Characters(), book, 1500, 50, seed=1)
    second = make_calibration(Characters(), book, 1500, 50, seed=1, avoid=[first])
    check_disjoint(first, second)
    assert shared_windows(first.tokens, second.tokens) == 0
    with pytest.raises(UserError, match="free of the text that must stay apart"):
        make_calibration(Characters(), book, 6000, 50, avoid=[first])


def test_overlap_is_found_even_when_shifted(book):
    stream = np.array(Characters()(book.read_text())["input_ids"][:4000])
    a = CalibrationSet.of(stream[:2000].reshape(-1, 100), "a")
    shifted = CalibrationSet.of(stream[17:2017].reshape(-1, 100), "b")
    assert shared_windows(a.tokens, shifted.tokens) > 0.3
    with pytest.raises(UserError, match="of b occur in a"):
        check_disjoint(a, shifted)
    check_disjoint(a, CalibrationSet.of(stream[2000:].reshape(-1, 100)))


def test_shared_windows_equals_counting_by_hand(book):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, (4, 9)), rng.integers(0, 3, (3, 7))
    known = {tuple(r[i : i + 3]) for r in a for i in range(7)}
    runs = [tuple(r[i : i + 3]) for r in b for i in range(5)]
    assert shared_windows(a, b, 3) == pytest.approx(sum(r in known for r in runs) / len(runs))


def test_tokenizer_of_another_model_is_refused(book):
    with pytest.raises(UserError, match="does not belong"):
        make_calibration(Characters(), book, 500, 50, vocab_size=50)


def test_folder_without_tokenizer_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_batches_keep_order_and_bound_tokens():
    found = CalibrationSet.of(np.arange(30).reshape(10, 3))
    batches = found.batches(10)
    assert [len(b) for b in batches] == [3, 3, 3, 1]
    assert np.array_equal(np.concatenate(batches), found.tokens)
    assert len(found.batches(1)) == 10
