"""A checkpoint with the shapes of a 30B-A3B MoE: scanned by every weights-only metric in one pass, killed once, and packed.

    python benchmarks/scan_scale.py --layers 8 --experts 128        # 10.9 GB of random weights, deleted afterwards
    python benchmarks/scan_scale.py --layers 1 --experts 64 --vocab 8000 --pack-only --repeats 3

Memory is sampled over the worker, the engine and its children: the largest resident set of one process, and the sum of
the proportional sets (pages that processes share are counted once). The worker is killed with SIGKILL when a third of the
steps is done. The packer gives every unit a random format; its CPU time is set against that of reading the checkpoint and
writing as many bytes as the packed one has, plus the quantiser's own. Appends one JSON line to
benchmarks/results/scan_scale.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation
from bitatlas.app import tasks
from bitatlas.kernels.formats import expand_formats, parse_format
from bitatlas.kernels.packed.shards import TensorSpec, write_shard

HIDDEN, EXPERT, HEADS, KV_HEADS, HEAD = 2048, 768, 32, 4, 128
FORMATS = "int{2,3,4,5,6,8}-g64"


def make_checkpoint(folder: Path, layers: int, experts: int, vocab: int) -> None:
    """Sharded bfloat16 weights, one shard a layer; every matrix a turned and scaled piece of a few heavy-tailed ones."""
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "intermediate_size": 6144,
        "moe_intermediate_size": EXPERT, "num_experts": experts, "num_experts_per_tok": 8, "vocab_size": vocab,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    pool = []
    for _ in range(4):
        rank = 192
        strength = torch.rand(rank, generator=generator).pow(-0.4) * 0.1
        w = torch.randn(4096, 2048, generator=generator) + (
            torch.randn(4096, rank, generator=generator) * strength
        ) @ torch.randn(rank, 2048, generator=generator)
        pool.append((w * 0.02).to(torch.bfloat16))

    def weight(rows: int, cols: int, seed: int) -> Tensor:
        base = pool[seed % len(pool)].roll(seed * 37, 0)
        if rows > 4096:
            return base.repeat(-(-rows // 4096), 1)[:rows, :cols]
        return base[:rows, :cols] if cols <= 2048 else base.T[:rows, :cols]

    def shard(name: str, shapes: dict[str, tuple[int, ...]], where: dict[str, str]) -> None:
        def tensors() -> Iterator[tuple[str, Tensor]]:
            for i, (key, shape) in enumerate(shapes.items()):
                ones = torch.ones(shape, dtype=torch.bfloat16)
                yield key, ones if len(shape) == 1 else weight(*shape, i + len(where))

        specs = [TensorSpec(key, torch.bfloat16, shape) for key, shape in shapes.items()]
        write_shard(folder / name, specs, tensors())
        where.update(dict.fromkeys(shapes, name))

    where: dict[str, str] = {}
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, HIDDEN), "lm_head.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,),
    }  # fmt: skip
    shard("model-ends.safetensors", ends, where)
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        shapes: dict[str, tuple[int, ...]] = {
            f"{stem}self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN), f"{stem}self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            f"{stem}self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN), f"{stem}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
            f"{stem}mlp.gate.weight": (experts, HIDDEN), f"{stem}input_layernorm.weight": (HIDDEN,),
        }  # fmt: skip
        for e in range(experts):
            for part, shape in (
                ("gate", (EXPERT, HIDDEN)),
                ("up", (EXPERT, HIDDEN)),
                ("down", (HIDDEN, EXPERT)),
            ):
                shapes[f"{stem}mlp.experts.{e}.{part}_proj.weight"] = shape
        shard(f"model-{layer:05d}.safetensors", shapes, where)
    total = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(text)


class Watch(threading.Thread):
    """Samples memory and CPU time of processes whose command line names ``home``, and of all below them."""

    def __init__(self, home: Path) -> None:
        super().__init__(daemon=True)
        self.home, self.over = str(home), threading.Event()
        self.largest = self.together = self.processes = 0
        self._cpu: dict[int, float] = {}

    def worker(self) -> psutil.Process | None:
        """The worker process, if there is one."""
        for p in psutil.process_iter(["cmdline"]):
            line = p.info["cmdline"] or []
            if "bitatlas.app.worker" in line and self.home in line:
                return p
        return None

    def run(self) -> None:
        worker, turn = None, 0
        while not self.over.wait(0.5):
            turn += 1
            try:
                if worker is None or not worker.is_running():
                    worker = self.worker()
                family = [worker, *worker.children(recursive=True)] if worker else []
                memory = [p.memory_info() for p in family]
                if turn % 20 == 0:
                    # Proportional sets are dear: the kernel walks every page of the mapped shards.
                    self.together = max(self.together, sum(p.memory_full_info().pss for p in family))
                for p in family:
                    times = p.cpu_times()
                    self._cpu[p.pid] = times.user + times.system
            except psutil.Error:
                worker = None
                continue
            self.largest = max([self.largest, *(m.rss for m in memory)])
            self.processes = max(self.processes, len(family))

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all processes seen."""
        return sum(self._cpu.values())


def scan(model: Path, home: Path) -> dict[str, Any]:
    """All weights-only metrics as one job, its worker killed once."""
    from bitatlas.analysis.metrics import METRICS
    from bitatlas.analysis.metrics.base import UnitMetric

    names = ",".join(name for name, m in METRICS.items() if issubclass(m, UnitMetric))
    watch = Watch(home)
    watch.start()
    start = time.perf_counter()
    job = tasks.submit_measure(model, names, formats=FORMATS)
    killed_at = 0
    while not killed_at:
        time.sleep(0.5)
        status = tasks.jobs_show(job)
        if status["total"] and status["done"] >= status["total"] / 3 and (worker := watch.worker()):
            killed_at = status["done"]
            worker.send_signal(signal.SIGKILL)
            worker.wait()
    parts_before = {p: p.stat().st_mtime_ns for p in (home / "runs").rglob("*.npz")}
    done = tasks.measure(model, names, formats=FORMATS, wait=True)
    seconds = time.perf_counter() - start
    watch.over.set()
    watch.join()
    assert done["id"] == job
    again = sum(p.stat().st_mtime_ns != at for p, at in parts_before.items())
    from bitatlas.cache.paths import Home
    from bitatlas.cache.store import Store

    rows = sum(len(Store(Home.default()).rows(run)) for run in done["result"]["runs"].values())
    return {
        "metrics": names.split(","), "steps": done["total"], "killed_at": killed_at, "parts_then": len(parts_before), "parts_repeated": again,
        "rows": rows, "scan_s": seconds, "scan_cpu_s": watch.cpu_s, "processes": watch.processes,
        "peak_rss_of_one_process": watch.largest, "peak_pss_of_all": watch.together,
    }  # fmt: skip


PACK = """
import json, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation
from bitatlas.app.work import pack
from bitatlas.kernels.quantizers.rtn import Rtn
model, plan, out = sys.argv[1:]
own, call = [0.0], Rtn.__call__
def timed(self, weight, fmt):
    start = time.process_time()
    try:
        return call(self, weight, fmt)
    finally:
        own[0] += time.process_time() - start
Rtn.__call__ = timed
allocation = Allocation.from_json(Path(plan).read_text())
start = time.process_time(), time.perf_counter()
result = pack.pack_model(index_model(model), allocation, out)
# Not ru_maxrss: that begins with the size of the process which started this one.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"pack_cpu_s": time.process_time() - start[0], "pack_s": time.perf_counter() - start[1], "quantiser_cpu_s": own[0],
    "pack_peak_rss": peak * 1024, "packed_bytes": result["bytes"],
    "predicted_bytes": result["predicted_bytes"]}))
"""


def copied(model: Path, target: Path, count: int) -> tuple[float, float]:
    """CPU and wall seconds of reading a checkpoint and writing ``count`` bytes."""
    # A buffer that stays in the cache: with 16 MiB the copy takes five times the CPU, and would flatter the packer.
    start, left, buffer = (time.process_time(), time.perf_counter()), count, bytearray(1 << 20)
    with target.open("wb", buffering=0) as copy:
        for shard in sorted(model.glob("*.safetensors")):
            with shard.open("rb", buffering=0) as source:
                while size := source.readinto(buffer):
                    copy.write(memoryview(buffer)[: min(size, left)])
                    left -= min(size, left)
        os.fsync(copy.fileno())
    return time.process_time() - start[0], time.perf_counter() - start[1]


def pack(model: Path, folder: Path) -> dict[str, Any]:
    """The packer in a process of its own, and a copy of the same bytes."""
    folder.mkdir()
    index, formats = index_model(model), [f.name for f in expand_formats(FORMATS)]
    rng = np.random.default_rng(0)
    chosen = {u.key: formats[rng.integers(len(formats))] for u in index.units}
    payload = sum(parse_format(chosen[u.key]).payload_bytes(u.rows, u.cols) for u in index.units)
    allocation = Allocation(
        index.digest, index.name, chosen, payload, index.kept_bytes, payload * 8 / index.params, solver="hand"
    )
    plan = folder / "plan.json"
    plan.write_text(allocation.to_json())
    command = [sys.executable, "-c", PACK, str(model), str(plan), str(folder / "packed")]
    out: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    out["copy_cpu_s"], out["copy_s"] = copied(model, folder / "copy", out["packed_bytes"])
    out["pack_over_copy_and_quantiser"] = out["pack_cpu_s"] / (out["copy_cpu_s"] + out["quantiser_cpu_s"])
    out["largest_tensor_bytes"] = max(u.params for u in index.units) * 2
    return out


def main() -> None:
    """Makes the checkpoint, scans and packs it, deletes it, writes the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where there is space; a temporary folder by default"
    )
    parser.add_argument("--pack-only", action="store_true", help="no metrics")
    parser.add_argument(
        "--repeats", type=int, default=1, help="of packing; the one with the least CPU time counts"
    )
    parser.add_argument("--out", default="benchmarks/results/scan_scale.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        os.environ["BITATLAS_HOME"] = str(folder / "home")
        model = folder / "model"
        make_checkpoint(model, args.layers, args.experts, args.vocab)
        index = index_model(model)
        record: dict[str, Any] = {
            "layers": args.layers, "experts": args.experts, "vocab": args.vocab, "units": len(index.units), "params": index.params,
            "bytes": sum(p.stat().st_size for p in model.glob("*.safetensors")), "formats": FORMATS,
            "device": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version(),
        }  # fmt: skip
        if not args.pack_only:
            record |= scan(model, folder / "home")
            print(json.dumps(record), flush=True)
        record |= min(
            (pack(model, folder / f"try{i}") for i in range(args.repeats)), key=lambda r: r["pack_cpu_s"]
        )
        if worker := Watch(folder / "home").worker():
            worker.terminate()
            worker.wait(20)
    record = {k: round(v, 3) if isinstance(v, float) else v for k, v in record.items()}
    with Path(args.out).open("a") as out:
        out.write(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
