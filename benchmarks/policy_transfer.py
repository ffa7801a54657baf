"""A RAMP-style policy trained on one model and applied unchanged to others, beside searches given the same number of tokens.

    python benchmarks/policy_transfer.py demo models/smollm2 models/gpt2 --texts demo,CALIBRATION.txt:HELD_OUT.txt,demo

The first model trains, the others are met for the first time. On each stand: the policy as it is (one walk over the units), the
same network untrained, and random search and EvoPress stopped at the first step after which they have spent as many
forward-equivalent tokens as the policy's training. All are brought to the same bytes and verified on the same held-out tokens,
which choose nothing. One JSON line per allocator, model and budget is appended to benchmarks/results/policy_transfer.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitatlas.analysis.calibration import check_disjoint, make_calibration
from bitatlas.analysis.evaluator import Evaluator
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.schema import ModelIndex, expand_formats
from bitatlas.analysis.unit_features import unit_features
from bitatlas.app import tasks
from bitatlas.app.tasks.measuring import calibration_file
from bitatlas.solvers import Problem, get_searcher, get_solver

LEARNER = "value decomposition"
"""What trains the policy; rows without this field are of the first learner, whose critics saw one return for all units."""

RIVALS = {
    "random_search": {"steps": 10**6},
    "evopress": {"steps": 10**6, "offspring": 16, "survivors": (4, 1), "tokens": (512, 2048), "initial": 16, "groups": "none"},
}  # fmt: skip


class Bench:
    """One model with its texts: searching on the one, judging on the other."""

    def __init__(self, model: str, texts: str, args: argparse.Namespace) -> None:
        self.index: ModelIndex = tasks.open_index(model)
        self.formats = expand_formats(args.formats)
        calibration, _, held_out = texts.partition(":")
        own = texts == "demo"
        demo = tasks.open_index("demo").path
        files = [calibration_file(demo, None, kind) if own else text
                 for kind, text in (("calibration", calibration), ("eval", held_out))]  # fmt: skip
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        loaded = LoadedModel.open(self.index, dtype=dtype)
        made = [
            make_calibration(loaded.tokenizer, str(f), n, args.seq_len, 0, vocab_size=self.index.vocab_size)
            for f, n in zip(files, (args.pool, args.tokens))
        ]
        check_disjoint(*made)
        self.engine, self.judge = (
            Evaluator(loaded, self.index.unit_keys(), self.formats, m.tokens, storage=dtype, ram_bytes=int(args.ram_gib * 2**30))
            for m in made
        )  # fmt: skip
        self.judge.weights = self.engine.weights  # made once for both
        self.features, self.feature_tokens = unit_features(self.engine, 1024), 1024
        self.held_out = made[1]

    @property
    def spent(self) -> float:
        """Forward-equivalent tokens so far."""
        return self.engine.spent.forward_equivalents

    def problem(self, bits: float) -> Problem:
        """A budget without damages: no search here is told any."""
        return Problem.build(self.index, None, self.formats, int(bits * self.index.params / 8))


def main() -> None:
    """Train, apply, compare."""
    args = arguments()
    models, texts = [args.source, *args.targets], args.texts.split(",")
    if len(texts) == 1:
        texts *= len(models)
    source = Bench(args.source, texts[0], args)
    paid = {}
    policies = {}
    for bits in args.bits:
        policies[bits], paid[bits] = trained(source, bits, args)
    for model, text in zip(models, texts, strict=True):
        bench = source if model == args.source else Bench(model, text, args)
        for bits in args.bits:
            made = list(proposals(bench, bits, policies[bits], paid[bits], args))
            scores = bench.judge.scores(np.array([choice for _, choice in made]), args.tokens, 0)
            for (facts, choice), kl, error in zip(made, scores.mean.tolist(), scores.stderr.tolist()):
                record = {
                    "learner": LEARNER, "source": source.index.name, "model": bench.index.name, "bits": bits, **facts, "payload_bytes": bench.problem(bits).payload(choice),
                    "kl": kl, "kl_stderr": error, "training_tokens": paid[bits], "cliff": args.cliff, "seed": args.seed, "held_out_tokens": args.tokens,
                    "held_out": bench.held_out.digest[:16], "formats": args.formats, "dtype": "bfloat16" if args.bf16 else "float32",
                    "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": platform.machine(), "torch": torch.__version__,
                    "python": platform.python_version(),
                }  # fmt: skip
                Path(args.out).parent.mkdir(parents=True, exist_ok=True)
                with Path(args.out).open("a") as out:
                    out.write(json.dumps(record) + "\n")
                print(
                    f"{record['model']} at {bits}: {facts['allocator']}: KL {kl:.4f} +- {error:.4f}, {facts['tokens']:,} tokens",
                    flush=True,
                )


def trained(bench: Bench, bits: float, args: argparse.Namespace) -> tuple[dict[str, np.ndarray], int]:
    """The policy after its last round, and the forward-equivalent tokens that it took."""
    before = bench.spent
    search = get_searcher("ramp")(
        bench.problem(bits), bench.engine, seed=args.seed, features=bench.features,
        settings={"steps": args.rounds, "tokens": args.round_tokens, "judge_tokens": 2 * args.round_tokens, "cliff": args.cliff},
    )  # fmt: skip
    state = search.begin()
    for number in range(1, args.rounds + 1):
        state = search.step(state, number)
        print(
            f"trained on {bench.index.name} at {bits}: round {number}, KL {float(state['kl']):.4f}",
            flush=True,
        )
    return {k: v for k, v in state.items() if k.startswith("policy.")}, int(bench.spent - before)


def proposals(
    bench: Bench, bits: float, policy: dict[str, np.ndarray], tokens: int, args: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Facts and choice (U,) of every allocator at a budget; ``tokens`` is what a search may spend."""
    problem = bench.problem(bits)
    yield {"allocator": "uniform", "tokens": 0, "cpu_s": 0.0}, get_solver("uniform").solve(problem).choice
    for name, given in (("policy", policy), ("untrained", None)):
        start = time.process_time()
        walk = get_searcher("ramp")(
            problem,
            bench.engine,
            seed=args.seed,
            features=bench.features,
            policy=given,
            settings={"steps": 0},
        )
        # One walk proposes; `run` would also measure it, which chooses nothing.
        choice = walk.proposal()
        facts = {
            "allocator": name,
            "tokens": bench.feature_tokens,
            "cpu_s": round(time.process_time() - start, 2),
        }
        yield facts, choice
    for name, settings in ((n, RIVALS[n]) for n in args.rivals):
        before, start = bench.spent, time.process_time()
        search = get_searcher(name)(problem, bench.engine, seed=args.seed, settings=settings)
        state = search.run(lambda end=before + tokens: bench.spent >= end)
        facts = {
            "allocator": name,
            "tokens": int(bench.spent - before),
            "cpu_s": round(time.process_time() - start, 2),
        }
        yield facts, np.asarray(state["choice"])


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="model that trains the policy")
    parser.add_argument("targets", nargs="+", help="models that it is applied to")
    parser.add_argument(
        "--texts",
        default="demo",
        help="CALIBRATION.txt:HELD_OUT.txt of each model, comma list; demo = the demo's own",
    )
    parser.add_argument("--formats", default="int{2,3,4,5,6,8}-g64")
    parser.add_argument("--bits", type=lambda s: [float(b) for b in s.split(",")], default=[3.5])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--round-tokens", type=int, default=512, help="tokens that a round scores its episodes on"
    )
    parser.add_argument("--rivals", type=lambda s: [r for r in s.split(",") if r], default=[*RIVALS],
                        help="searches to compare with, comma list, may be empty")  # fmt: skip
    parser.add_argument("--pool", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--ram-gib", type=float, default=4.0, help="for quantised weights")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument(
        "--cliff", type=float, default=get_searcher("ramp").SETTINGS["cliff"], help="of the training's reward"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results/policy_transfer.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
