"""An allocation quantised, packed and loaded back: the KL that verify had promised, the size, the memory, the time.

    bitatlas search MODEL --solver path --metric fisher --bits 3.25 -o best.json
    python benchmarks/packed_best.py MODEL best.json --calibration CALIBRATION.txt --text HELD_OUT.txt [--quantizer gptq]

`verify` puts quantised weights into the original model; the packed checkpoint is loaded by `kernels.packed.load` and measured on
the same held-out tokens against the same original logits. The packer runs in a process of its own, which tells its peak memory,
its CPU time and the share of the quantiser (reading the model for its statistics, gathering them, rounding); what is left is
set against reading the checkpoint and writing as many bytes as were packed. Appends one JSON line to benchmarks/results/packed_best.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from scan_scale import copied

from bitatlas.analysis.calibration import make_calibration
from bitatlas.analysis.divergence import token_kl
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation
from bitatlas.app import tasks
from bitatlas.kernels.packed import load

PACK = """
import json, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from bitatlas.analysis.calibration import load_tokenizer, make_calibration
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation
from bitatlas.analysis.quantising import UnitQuantizer
from bitatlas.app.work import pack
from bitatlas.kernels.quantizers import get_quantizer
model, plan, out, quantizer, text, tokens, seq_len = sys.argv[1:]
own, depth = [0.0], [0]
def timed(call):
    def run(*args, **kwargs):
        start, depth[0] = time.process_time(), depth[0] + 1
        try:
            return call(*args, **kwargs)
        finally:
            depth[0] -= 1
            if not depth[0]:
                own[0] += time.process_time() - start
    return run
kind = get_quantizer(quantizer)
kind.__call__ = timed(kind.__call__)
pack.Packer._source = timed(pack.Packer._source)
UnitQuantizer.instance = timed(UnitQuantizer.instance)  # gathers the statistics that it asks for
index = index_model(model)
calibration = make_calibration(load_tokenizer(Path(index.path)), text, int(tokens), int(seq_len), 0, vocab_size=index.vocab_size)
allocation = Allocation.from_json(Path(plan).read_text())
start = time.process_time()
result = pack.pack_model(index, allocation, out, quantizer=quantizer, calibration=calibration)
# Not ru_maxrss: that begins with the size of the process which started this one.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"pack_cpu_s": time.process_time() - start, "quantiser_cpu_s": own[0], "packed_bytes": result["bytes"],
    "predicted_bytes": result["predicted_bytes"], "pack_peak_rss": peak * 1024}))
"""


def main() -> None:
    """Packs, loads back, measures, writes the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("allocation")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--quantizer", default="gptq")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--calibration-seq-len", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--prompt", default="The city of Paris is")
    parser.add_argument("--out", default="benchmarks/results/packed_best.jsonl")
    args = parser.parse_args()
    index = index_model(args.model)
    allocation = Allocation.from_json(Path(args.allocation).read_text())
    promised = tasks.verify(
        args.model, allocation, text=args.text, tokens=args.tokens, seq_len=args.seq_len, quantizer=args.quantizer,
        calibration=args.calibration, calibration_tokens=args.calibration_tokens, calibration_seq_len=args.calibration_seq_len,
    )["results"][0]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        plan, packed = Path(folder) / "plan.json", Path(folder) / "packed"
        plan.write_text(allocation.to_json())
        command = [
            sys.executable, "-c", PACK, args.model, str(plan), str(packed), args.quantizer, args.calibration,
            str(args.calibration_tokens), str(args.calibration_seq_len),
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        facts: dict[str, Any] = json.loads(run.stdout)
        facts["copy_cpu_s"], _ = copied(Path(index.path), Path(folder) / "copy", facts["packed_bytes"])
        original, back = LoadedModel.open(index), load(packed)
        tokens = make_calibration(
            original.tokenizer, args.text, args.tokens, args.seq_len, 0, vocab_size=index.vocab_size
        ).tokens
        with torch.no_grad():
            kl = torch.cat(
                [
                    token_kl(original.logits(ids), back(ids).logits)
                    for ids in torch.from_numpy(tokens).split(4)
                ]
            )
        said = tasks.generate(packed, args.prompt, max_new_tokens=40)["text"]
    record = {
        "model": index.name, "allocation": allocation.solver, "quantizer": args.quantizer, "bits_per_weight": allocation.bits_per_weight,
        "kl_verify": promised["kl_mean"], "kl_stderr": promised["kl_stderr"], "kl_packed": float(kl.mean()), "tokens": int(kl.numel()),
        "size_over_prediction": facts["packed_bytes"] / facts["predicted_bytes"], **facts,
        "pack_over_copy_and_quantiser": facts["pack_cpu_s"] / (facts["copy_cpu_s"] + facts["quantiser_cpu_s"]), "says": said,
        "calibration_tokens": args.calibration_tokens, "device": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as lines:
        lines.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
