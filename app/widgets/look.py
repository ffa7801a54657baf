"""Light or dark, as the browser shows it now."""

from __future__ import annotations

import streamlit as st

from bitatlas.app.theme import Palette, palette

__all__ = ["current_palette"]


def current_palette() -> Palette:
    """The palette of the theme in use; light when the browser has not said."""
    return palette(getattr(st.context.theme, "type", None) == "dark")
