"""The verifying job: allocations run for real on held-out text, against the original."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitatlas.analysis.calibration import CalibrationSet, load_tokenizer, make_calibration
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.schema import Allocation, ModelIndex, UserError
from bitatlas.analysis.verify import Verifier
from bitatlas.app.devices import pick_device, pick_dtype
from bitatlas.app.jobs.work import Work
from bitatlas.app.work.checkpoint import loadable, unchanged
from bitatlas.app.work.parts import load_part, save_part
from bitatlas.cache.keys import digest
from bitatlas.cache.store import Store
from bitatlas.kernels.packed.manifest import Manifest

__all__ = ["VerifyWork"]


def _packed_model(
    packed: dict[str, str], plan: Allocation, device: str, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Logits of a packed folder, as long as it is the one that the job was asked about; K and V as its plan says."""
    from bitatlas.analysis.kv.readers import PlanReader
    from bitatlas.analysis.kv.tap import read_logits
    from bitatlas.kernels.packed import load

    if digest(Manifest.read(Path(packed["folder"])).to_json()) != packed["sha"]:
        raise UserError(f"{packed['folder']} changed since this job was submitted", fix="submit it again")
    model = load(packed["folder"], dtype=dtype, device=device)
    if not plan.kv:
        return lambda ids: model(input_ids=ids.to(device), use_cache=False).logits.float()
    reader = PlanReader(plan.kv_plan, plan.kv_layout)
    return lambda ids: read_logits(model, ids.to(device), reader)


class VerifyWork(Work):
    """Parameters are those of `app.tasks.verifying.submit_verify`."""

    KIND = "verify"

    @cached_property
    def index(self) -> ModelIndex:
        """The model, as it was when the job was asked for.

        Raises:
            UserError: the checkpoint changed since.
        """
        return unchanged(self.params)

    @cached_property
    def allocations(self) -> dict[str, Allocation]:
        """Allocation id -> allocation."""
        store = Store(self.home)
        return {key: store.allocation(key) for key in self.params["allocations"]}

    @cached_property
    def text(self) -> CalibrationSet:
        """The held-out sequences."""
        p = self.params
        source = loadable(self.index, self.home)
        tokenizer = load_tokenizer(source.path)
        return make_calibration(
            tokenizer, p["text"], p["tokens"], p["seq_len"], p["seed"], vocab_size=source.vocab_size
        )

    @cached_property
    def verifier(self) -> Verifier:
        """The model in memory; quantised weights are kept between steps."""
        source = loadable(self.index, self.home)
        # The original and what it is compared with, side by side. A folder's own precision would show as damage.
        need = 4 * source.params + source.kept_bytes
        device = pick_device(
            self.params.get("device", "auto"), (1 + len(self.params.get("packed", []))) * need
        )
        dtype = pick_dtype(self.params.get("dtype", "float32"), device)
        loaded = LoadedModel.open(source, dtype, device)
        formats = {key: a.formats for key, a in self.allocations.items()}
        packed = {p["folder"]: p for p in self.params.get("packed", [])}
        plans = {folder: Store(self.home).allocation(p["allocation"]) for folder, p in packed.items()}
        kv = {key: (a.kv_plan, a.kv_layout) for key, a in (self.allocations | plans).items()}
        return Verifier(
            loaded, source, self.text.tokens, formats, quantizer=self.params.get("quantizer", "rtn"),
            calibration=None if self.calibration is None else self.calibration.tokens,
            packed={folder: _packed_model(p, plans[folder], device, dtype) for folder, p in packed.items()},
            kv=kv,
        )  # fmt: skip

    @cached_property
    def calibration(self) -> CalibrationSet | None:
        """The quantiser's text, made as packing makes it."""
        p = self.params
        if not p.get("calibration"):
            return None
        source = loadable(self.index, self.home)
        return make_calibration(
            load_tokenizer(source.path), p["calibration"], p["calibration_tokens"], p["calibration_seq_len"], 0,
            vocab_size=source.vocab_size,
        )  # fmt: skip

    def _about(self, label: str) -> dict[str, Any]:
        """Which allocation a result is of, how its codes were chosen, and what tells it from others of the same."""
        settings = {"seq_len": self.params["seq_len"], "seed": self.params["seed"]}
        settings |= {"dtype": self.params["dtype"]} if "dtype" in self.params else {}
        for p in self.params.get("packed", []):
            if p["folder"] == label:
                quantizer = Manifest.read(Path(label)).quantizer
                return {"allocation": p["allocation"], "quantizer": quantizer, "packed": label,
                        "settings": settings | {"packed": p["sha"]}}  # fmt: skip
        quantizer = self.params.get("quantizer", "rtn")
        if quantizer != "rtn":
            settings |= {
                "quantizer": quantizer,
                "calibration": self.calibration.digest if self.calibration else "",
            }
        return {"allocation": label, "quantizer": quantizer, "packed": "", "settings": settings}

    @property
    def _parts(self) -> str:
        return "verify-" + digest(self.params)

    def plan(self) -> list[str]:
        """A few sequences a step."""
        return self.verifier.steps()

    def run(self, key: str) -> dict[str, Any]:
        """One step; its arrays stay on disk until the end."""
        folder = self.home.runs(self._parts)
        if load_part(folder, key) is None:
            save_part(folder, key, self.verifier.run(key))
        return {"note": key}

    def finish(self) -> dict[str, Any]:
        """Results per allocation, stored as verifications."""
        folder = self.home.runs(self._parts)
        parts = {key: load_part(folder, key) or {} for key in self.verifier.steps()}
        store, results = Store(self.home), []
        for key, result in self.verifier.results(parts).items():
            about, data = self._about(key), result.to_dict()
            allocation = store.allocation(about["allocation"])
            row = {
                **about,
                "model_digest": self.params["digest"],
                "text_digest": self.text.digest,
                "text": self.text.source,
                "tokens": data["tokens"],
                "kl_mean": data["kl_mean"],
                "kl_stderr": data["kl_stderr"],
                "kl_p50": data["kl_p50"],
                "kl_p99": data["kl_p99"],
                "flips": data["top1_flips"],
                "ppl_before": data["ppl_before"],
                "ppl_after": data["ppl_after"],
                "floor": data["noise_floor"],
                "sequences": data["kl_sequences"],
            }
            store.put_verification(row)
            plan = {"solver": allocation.solver, "metric": allocation.metric, "bits_per_weight": allocation.bits_per_weight,
                     "weights_bytes": allocation.weights_bytes, "predicted": allocation.predicted}  # fmt: skip
            results.append({**plan, **{k: v for k, v in row.items() if k not in ("sequences", "settings")}})
        return {"results": results}
