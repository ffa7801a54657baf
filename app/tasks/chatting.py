"""Talking to a model: a packed folder or an original, by its chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bitatlas.app.checks import check_new_tokens
from bitatlas.app.devices import check_place
from bitatlas.app.talker import Message, Talker, is_packed
from bitatlas.app.tasks.models import register
from bitatlas.cache.paths import Home

__all__ = ["chat"]


def chat(
    model: str | Path,
    lines: Iterable[str],
    *,
    system: str = "",
    max_new_tokens: int = 256,
    say: Callable[[str], None] = lambda _: None,
    device: str = "auto",
    dtype: str = "auto",
) -> list[Message]:
    """A conversation: each line is the user's turn, ``say`` is told each answer. An empty line is skipped,
    ``/reset`` forgets what was said, ``/quit`` ends it. ``device`` and ``dtype`` are words of `app.devices`.

    Returns:
        The conversation since the last reset.
    """
    check_new_tokens(max_new_tokens)
    check_place(device, dtype)
    talker = _talker(model, device, dtype)
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    for line in _turns(lines):
        if line == "/reset":
            messages = list(first)
            continue
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": talker.answer(messages, max_new_tokens)})
        say(messages[-1]["content"])
    return messages


def _talker(model: str | Path, device: str, dtype: str) -> Talker:
    folder = Path(model).expanduser()
    if is_packed(folder):
        return Talker.packed(folder, device, dtype)
    from bitatlas.app.work.checkpoint import loadable

    return Talker.original(loadable(register(model), Home.default()), device, dtype)


def _turns(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if (text := line.strip()) in ("/quit", "/exit"):
            return
        if text:
            yield text
