"""Below every view: its command-line twin, and its data as files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import null_nan

__all__ = ["cli_twin", "command", "downloads"]


def command(*words: object, **options: object) -> str:
    """A shell line: ``command("solve", path, metric="x", fit="8GiB")``; None and "" leave an option out."""
    parts = ["bitatlas", *(str(w) for w in words)]
    for name, value in options.items():
        many: Iterable[object] = value if isinstance(value, (list, tuple)) else [value]
        for one in many:
            if one is True:
                parts.append("--" + name.replace("_", "-"))
            elif one is not None and one is not False and one != "":
                parts += ["--" + name.replace("_", "-"), str(one)]
    return shlex.join(parts)


def cli_twin(line: str) -> None:
    """The same from the shell, with a copy button."""
    st.code(line, language="bash", wrap_lines=True)


def downloads(
    name: str, table: Callable[[], pd.DataFrame], view: Callable[[], Mapping[str, Any]], key: str
) -> None:
    """CSV of the table in its current filter and JSON of the view; both made only when asked for."""
    with st.container(horizontal=True, width="content"):
        st.download_button(
            "CSV", lambda: table().to_csv(index=False).encode(), f"{name}.csv", "text/csv", key=f"{key}_csv",
            icon=":material/download:", on_click="ignore",
        )  # fmt: skip
        st.download_button(
            "JSON", lambda: (json.dumps(null_nan(dict(view())), indent=1) + "\n").encode(), f"{name}.json",
            "application/json", key=f"{key}_json", icon=":material/download:", on_click="ignore",
        )  # fmt: skip
