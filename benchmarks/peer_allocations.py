"""Bit allocations of other tools, as JSON, so that `peers.py` can measure them with our own verification.

Runs inside a virtual environment that has the peer (and this project's dependencies), for instance

    python benchmarks/peer_allocations.py auto-round models/smollm2 --calibration TEXT --bits 3.2 3.45 3.94 -o build/peers

and writes one file for each average: {"peer", "version", "target", "settings", "seconds", "tokens", "bits": {module: bits}}.
Only the linear layers inside the blocks are allocated; embeddings stay as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def _load(model: str) -> tuple[Any, Any]:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True).eval()
    return loaded, AutoTokenizer.from_pretrained(model)


def _sequences(tokenizer: Any, text: str, count: int, length: int) -> torch.Tensor:
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    at = torch.linspace(0, len(ids) - length - 1, count).long()
    return torch.stack([ids[i : i + length] for i in at.tolist()])


def _auto_round(args: argparse.Namespace) -> Callable[[float], tuple[dict[str, int], dict[str, Any]]]:
    from auto_round import AutoRound, AutoScheme

    _, tokenizer = _load(args.model)
    rows = _sequences(tokenizer, args.calibration, args.samples, args.length)
    lines = Path(args.out) / "calibration.jsonl"
    lines.write_text("".join(json.dumps({"text": tokenizer.decode(r)}) + "\n" for r in rows))
    options = ",".join(f"W{b}A16G{args.group}" for b in (2, 3, 4, 8))

    def solve(target: float) -> tuple[dict[str, int], dict[str, Any]]:
        model, tok = _load(args.model)
        scheme = AutoScheme(
            avg_bits=target, options=options, nsamples=args.samples, seqlen=args.length, batch_size=4, dataset=str(lines),
            enable_torch_compile=False, low_gpu_mem_usage=False, ignore_scale_zp_bits=True,
        )  # fmt: skip
        run = AutoRound(
            model, tok, scheme=scheme, iters=0, nsamples=args.samples, seqlen=args.length, batch_size=4, dataset=str(lines),
            enable_torch_compile=False, device_map="cpu",
        )  # fmt: skip
        run.post_init()
        bits = {n: int(c["bits"]) for n, c in run.layer_config.items() if int(c.get("bits", 16)) < 16}
        return bits, {"options": options, "passes": 4}

    return solve


def _modelopt(args: argparse.Namespace) -> Callable[[float], tuple[dict[str, int], dict[str, Any]]]:
    import modelopt.torch.quantization as mtq

    def solve(target: float) -> tuple[dict[str, int], dict[str, Any]]:
        model, tokenizer = _load(args.model)
        batches = [
            {"input_ids": b, "labels": b}
            for b in _sequences(tokenizer, args.calibration, args.samples, args.length).split(2)
        ]
        linear = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        head = linear.pop("lm_head", 0)
        # Its average counts the head, which stays at 16 bits.
        average = (16 * head + target * sum(linear.values())) / (head + sum(linear.values()))
        four, eight = mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, mtq.INT8_WEIGHT_ONLY_CFG
        model, state = mtq.auto_quantize(
            model, constraints={"effective_bits": average}, quantization_formats=[four, eight], data_loader=batches,
            forward_step=lambda m, b: m(**b), loss_func=lambda out, b: out.loss, num_calib_steps=1,
            num_score_steps=len(batches), disabled_layers=["*lm_head*"],
        )  # fmt: skip
        bits = {}
        for name, module in model.named_modules():
            quantizer = getattr(module, "weight_quantizer", None)
            if quantizer is not None and quantizer.is_enabled:
                bits[name] = int(quantizer.num_bits)
        return bits, {"options": "INT4 block 128, INT8 channel", "method": "gradient", "passes": 1}

    return solve


def _nncf(args: argparse.Namespace) -> Callable[[float], tuple[dict[str, int], dict[str, Any]]]:
    import nncf

    def solve(target: float) -> tuple[dict[str, int], dict[str, Any]]:
        model, tokenizer = _load(args.model)
        rows = _sequences(tokenizer, args.calibration, args.samples, args.length)
        shapes = {
            n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)
        }
        # NNCF knows the share of 4-bit parameters, the rest gets 8: the share that gives the asked average.
        packed = nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode.INT4_ASYM, ratio=(8 - target) / 4, group_size=args.group,
            backup_mode=nncf.BackupMode.INT8_ASYM, sensitivity_metric=nncf.SensitivityMetric.HESSIAN_INPUT_ACTIVATION,
            dataset=nncf.Dataset([{"input_ids": r[None]} for r in rows]), all_layers=False,
        )  # fmt: skip
        bits = {}
        for name, tensor in packed.state_dict().items():
            owner = name.removesuffix(".weight")
            if (
                name.endswith(".weight")
                and owner in shapes
                and owner != "lm_head"
                and not tensor.is_floating_point()
            ):
                # Two 4-bit codes share a byte, so a 4-bit weight has half the elements.
                bits[owner] = 8 if tensor.numel() == shapes[owner][0] * shapes[owner][1] else 4
        return bits, {"metric": "hessian_input_activation", "passes": 1}

    return solve


PEERS = {"auto-round": _auto_round, "nvidia-modelopt": _modelopt, "nncf": _nncf}


def main() -> None:
    """Solves at each average and writes the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--bits", type=float, nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("-o", "--out", default="build/peers")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    solve = PEERS[args.peer](args)
    for target in args.bits:
        start = time.perf_counter()
        bits, settings = solve(target)
        record = {
            "peer": args.peer, "version": version(args.peer), "target": target, "samples": args.samples, "length": args.length,
            "settings": settings, "seconds": round(time.perf_counter() - start, 1),
            "tokens": args.samples * args.length * settings["passes"], "bits": bits,
        }  # fmt: skip
        path = Path(args.out) / f"{args.peer}-{target}.json"
        path.write_text(json.dumps(record, indent=1))
        print(
            path,
            record["seconds"],
            "s",
            {b: list(bits.values()).count(b) for b in sorted(set(bits.values()))},
            flush=True,
        )


if __name__ == "__main__":
    main()
