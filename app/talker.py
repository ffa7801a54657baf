"""A model that answers: a packed folder or an original, greedily, by its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitatlas.analysis.schema import ModelIndex, UserError

__all__ = ["Message", "Talker", "is_packed"]

Message = dict[str, str]


class Talker:
    """A model with its tokenizer, asked greedily, so that two models can be compared answer by answer.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer; without a chat template the last message alone is the prompt.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def answer(self, messages: list[Message], max_new_tokens: int = 256) -> str:
        """The answer to a conversation that ends with the user's words.

        Raises:
            UserError: the template refuses the conversation, or nothing was said.
        """
        import torch

        ids = self._ids(messages)
        with torch.no_grad():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
            )  # fmt: skip
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    def _ids(self, messages: list[Message]) -> Any:
        if self.tokenizer.chat_template:
            try:
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            except Exception as e:  # noqa: BLE001 - templates raise whatever their author wrote
                raise UserError("the chat template refuses this conversation", found=str(e)[:200]) from None
            ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        else:
            ids = self.tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"]
        if ids.shape[1] == 0:
            raise UserError("the prompt is empty")
        return ids

    @classmethod
    def packed(cls, folder: Path) -> Talker:
        """What `pack` wrote, its weights packed."""
        from bitatlas.analysis.calibration import load_tokenizer
        from bitatlas.kernels.packed import load

        return cls(load(folder), load_tokenizer(folder))

    @classmethod
    def original(cls, index: ModelIndex) -> Talker:
        """A checkpoint that can be loaded."""
        from bitatlas.analysis.loaded import LoadedModel

        loaded = LoadedModel.open(index)
        return cls(loaded.model, loaded.tokenizer)


def is_packed(folder: Path) -> bool:
    """Whether a folder is what `pack` writes, finished or not."""
    from bitatlas.kernels.packed.manifest import MANIFEST, PARTIAL

    return (folder / MANIFEST).is_file() or (folder / PARTIAL).is_file()
