"""A model that answers: a packed folder or an original, greedily, by its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitatlas.analysis.schema import Allocation, ModelIndex, UserError
from bitatlas.app.devices import pick_device, pick_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Message", "Talker", "is_packed"]

Message = dict[str, str]


class Talker:
    """A model with its tokenizer, asked greedily, so that two models can be compared answer by answer.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer; without a chat template the last message alone is the prompt.
        plan: K and V are packed as it says; None = the model's own precision.
    """

    def __init__(self, model: Any, tokenizer: Any, plan: Allocation | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._plan = plan if plan is not None and plan.kv else None

    def answer(self, messages: list[Message], max_new_tokens: int = 256) -> str:
        """The answer to a conversation that ends with the user's words.

        Raises:
            UserError: the template refuses the conversation, or nothing was said.
        """
        ids = self._ids(messages)
        out, _ = self.go_on(ids, max_new_tokens)
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    def go_on(self, ids: Tensor, max_new_tokens: int) -> tuple[Tensor, int | None]:
        """Token ids (1, T) continued greedily: (1, T + new), and the bytes of packed K and V at the end.

        The bytes are measured; None for a cache at the model's own precision.
        """
        import torch

        from bitatlas.kernels.kv.attention import attend_packed
        from bitatlas.kernels.kv.cache import PackedKvCache

        ids = ids.to(self.model.device)
        plan = self._plan
        cache = PackedKvCache(self.model.config, plan.kv_plan, plan.kv_layout) if plan else None
        with torch.no_grad(), attend_packed(self.model, cache):
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0, past_key_values=cache,
            )  # fmt: skip
        return out, cache.nbytes if cache else None

    def _ids(self, messages: list[Message]) -> Tensor:
        if self.tokenizer.chat_template:
            try:
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            except Exception as e:  # noqa: BLE001 - templates raise whatever their author wrote
                raise UserError("the chat template refuses this conversation", found=str(e)[:200]) from None
            return self.ids(text, add_special_tokens=False)
        return self.ids(messages[-1]["content"])

    def ids(self, text: str, **options: Any) -> Tensor:
        """Token ids (1, T).

        Raises:
            UserError: there are none.
        """
        ids: Tensor = self.tokenizer(text, return_tensors="pt", **options)["input_ids"]
        if ids.shape[1] == 0:
            raise UserError("the prompt is empty")
        return ids

    @classmethod
    def packed(cls, folder: Path, device: str = "cpu", dtype: str = "auto") -> Talker:
        """What `pack` wrote: its weights packed, and K and V too where its allocation says so.

        ``device`` and ``dtype`` are words of `app.devices`.
        """
        from bitatlas.analysis.calibration import load_tokenizer
        from bitatlas.app.tasks.solving import read_allocation
        from bitatlas.kernels.packed import load
        from bitatlas.kernels.packed.manifest import Manifest

        file = folder / "allocation.json"
        plan = read_allocation(file) if file.is_file() else None
        place = pick_device(device, sum(Manifest.read(folder).shards))
        model = load(folder, dtype=pick_dtype(dtype, place), device=place)
        return cls(model, load_tokenizer(folder), plan)

    @classmethod
    def original(cls, index: ModelIndex, device: str = "cpu", dtype: str = "auto") -> Talker:
        """A checkpoint that can be loaded; ``device`` and ``dtype`` as in `packed`."""
        from bitatlas.analysis.loaded import LoadedModel

        place = pick_device(device, 4 * index.params + index.kept_bytes)
        loaded = LoadedModel.open(index, pick_dtype(dtype, place), place)
        return cls(loaded.model, loaded.tokenizer)


def is_packed(folder: Path) -> bool:
    """Whether a folder is what `pack` writes, finished or not."""
    from bitatlas.kernels.packed.manifest import MANIFEST, PARTIAL

    return (folder / MANIFEST).is_file() or (folder / PARTIAL).is_file()
