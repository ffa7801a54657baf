"""The demo's training script: texts, optimiser, balance loss, and a whole smoke run."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    """Import a module of examples/ by name, as the script itself does."""
    sys.path.insert(0, str(EXAMPLES))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three little works of made-up paragraphs."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    words = [
        "crown",
        "king",
        "night",
        "love",
        "sword",
        "queen",
        "the",
        "of",
        "and",
        "shall",
        "my",
        "lord",
        "thou",
        "art",
        "most",
        "noble",
        "grave",
        "moon",
    ]
    for name in ("alpha", "beta", "tempest"):
        lines = [" ".join(rng.choices(words, k=8)) + ("\n" if i % 5 == 4 else "") for i in range(300)]
        (folder / f"{name}_gut.txt").write_text("\n".join(lines))
    return folder


def smoke(example: ModuleType, texts: Path, out: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    argv = ["--smoke", "--warmup", "3", "--seed", str(seed), "--text", str(texts), "--out", str(out)]
    example("train_demo").main([*argv, "--report", str(out / "report.json")])
    return {
        k: v for f in sorted((out / "shakespeare-moe").glob("*.safetensors")) for k, v in load_file(f).items()
    }


def test_smoke_run_writes_a_loadable_sharded_checkpoint(example, texts, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = smoke(example, texts, tmp_path)
    model_dir = tmp_path / "shakespeare-moe"
    shards = sorted(model_dir.glob("*.safetensors"))
    assert len(shards) >= 2
    index = json.loads((model_dir / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(tensors)
    assert set(index.values()) == {s.name for s in shards}
    assert all(t.dtype == torch.bfloat16 for t in tensors.values())
    assert {f.name for f in tmp_path.iterdir()} == {"shakespeare-moe", "text", "report.json"}

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = "My lord,\n\n  é 'tis"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.tie_word_embeddings

    evaluation = (tmp_path / "text" / "eval.txt").read_text()
    assert evaluation.strip() == (texts / "tempest_gut.txt").read_text().strip()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["held_out_works"] == ["tempest"]
    assert 1 < report["perplexity"] < 2 * len(tokenizer)
    assert report["command"] == "python examples/train_demo.py --smoke --warmup 3"
    kl = report["kl_nats_per_token"]
    assert kl["int2-g64"] > kl["int4-g64"] > 0
    assert all(sum(layer) == pytest.approx(2, abs=1e-3) for layer in report["expert_usage"])
    card = (model_dir / "README.md").read_text()
    assert report["command"] in card
    assert str(tmp_path) not in card


def test_same_seed_same_weights(example, texts, tmp_path):
    first, second, other = (
        smoke(example, texts, tmp_path / n, seed) for n, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_clean_drops_markup_and_licence_but_no_verse(example):
    raw = "<b>ACT I</b>\r\n\r\n\r\n\r\nAnd my pretext to strike\t\r\nThis Etext is free\r\nProject Gutenberg\r\n'Tis <i>so</i>.  \r\n"
    assert example("demo_text").clean(raw) == "ACT I\n\nAnd my pretext to strike\n'Tis so.\n"


def test_folio_and_milton_are_left_out(example, tmp_path):
    for name in (
        "shksprdata/texts/lear_gut.txt",
        "shksprdata/texts/lear_gut_f.txt",
        "miltondata/texts/comus_gut.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    text = example("demo_text")
    assert [w.name for w in text.load_works([tmp_path])] == ["lear"]
    assert [w.name for w in text.load_works([tmp_path / "shksprdata" / "texts"])] == ["lear"]


def test_a_work_given_twice_is_refused(example, tmp_path):
    for name in ("lear", "king_lear"):
        (tmp_path / f"{name}.txt").write_text("Nothing will come of nothing.")
    with pytest.raises(SystemExit, match="same work as king_lear"):
        example("demo_text").load_works([tmp_path])


def test_one_work_is_not_enough(example, tmp_path):
    (tmp_path / "lear.txt").write_text("Nothing will come of nothing.")
    text = example("demo_text")
    with pytest.raises(SystemExit, match="held out"):
        text.split_works(text.load_works([tmp_path]))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SystemExit, match="no text"):
        text.load_works([empty])


def test_excerpts_are_whole_paragraphs_of_every_work(example):
    text = example("demo_text")
    works = [text.Work(n, "\n\n".join(f"{n} {i} " + "x" * 40 for i in range(200)) + "\n") for n in "ab"]
    cut = text.excerpts(works, 4000)
    paragraphs = cut.strip().split("\n\n")
    assert set(paragraphs) <= {p for w in works for p in w.text.strip().split("\n\n")}
    assert {p[0] for p in paragraphs} == {"a", "b"}
    assert 3500 < len(cut) < 4500


@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 9, 5), (1, 6, 6)])
def test_orthogonalise_keeps_the_singular_vectors(example, shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    inner = u.mT @ example("demo_optim").orthogonalise(g, steps=8) @ vt.mT  # (n, k, k)
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    assert ((diagonal > 0.6) & (diagonal < 1.25)).all()
    assert torch.allclose(inner, torch.diag_embed(diagonal), atol=1e-6)


def test_muon_treats_fused_halves_apart(example):
    optim = example("demo_optim")
    g = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(2))
    fused, gate, up = (torch.nn.Parameter(torch.zeros(s)) for s in ((2, 8, 3), (2, 4, 3), (2, 4, 3)))
    fused.grad, gate.grad, up.grad = g.clone(), g[:, :4].clone(), g[:, 4:].clone()
    optim.Muon([{"params": [fused], "split": 2}], lr=0.1).step()
    optim.Muon([{"params": [gate, up]}], lr=0.1).step()
    assert torch.allclose(fused, torch.cat([gate, up], dim=1), atol=1e-6)
    assert fused.abs().max() > 0


def test_balance_loss_is_one_when_even_and_grows_when_not(example):
    balance = example("train_demo").balance_loss
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(3))
    probs = logits.softmax(-1)
    picks = probs.argsort(-1, descending=True)[:, :2].flatten().tolist()
    naive = sum(4 * picks.count(e) / len(picks) * probs[:, e].mean().item() for e in range(4))
    assert balance((logits, logits), 2).item() == pytest.approx(naive, rel=1e-5)
    assert balance((torch.eye(4) * 50,), 1).item() == pytest.approx(1, rel=1e-5)
    collapsed = torch.tensor([[50.0, 0, 0, 0]]).expand(8, 4)
    assert balance((collapsed,), 1).item() == pytest.approx(4, rel=1e-5)


def test_schedule_warms_up_and_ends_near_zero(example):
    schedule = example("demo_train").schedule
    values = [schedule(s, 100, 10) for s in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == max(values[9:12]) <= 1
    assert math.isclose(values[-1], 0, abs_tol=1e-3)
    assert values[10:] == sorted(values[10:], reverse=True)


def test_a_dense_model_of_another_architecture(example, texts, tmp_path):
    from bitatlas.analysis.model_index import index_model

    for name in ("a", "b"):
        argv = [str(tmp_path / name), "--smoke", "--text", str(texts), "--steps", "3", "--eval-tokens", "128"]
        example("train_dense").main(argv)
    index = index_model(tmp_path / "a")
    assert index.architecture == "GPT2LMHeadModel"
    assert not index.n_experts
    assert index.vocab_size == 1024  # the demo's tokenizer
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("a", "b"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert "int2-g64" in (tmp_path / "a" / "README.md").read_text()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b"]
