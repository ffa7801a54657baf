"""The dashboard: `streamlit run app/main.py`. Page set-up, navigation and the frame around every page."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import streamlit as st

from bitatlas.analysis.schema import UserError
from bitatlas.app.screens import SCREENS, Screen
from bitatlas.app.theme import favicon, logo
from bitatlas.app.widgets.boxes import error_box
from bitatlas.app.widgets.frame import STYLE, draw_frame


def _drawn(screen: Screen) -> Callable[[], None]:
    def draw() -> None:
        # Imported when shown: the first page is up before the others are loaded.
        importlib.import_module(f"bitatlas.app.screens.{screen.name}").page()

    draw.__name__ = screen.name
    return draw


def _home() -> None:
    st.switch_page(st.session_state["_pages"][SCREENS[0].name])


def main() -> None:
    """Draw the frame and the page in it."""
    st.set_page_config(page_title="bitatlas", page_icon=favicon(), layout="wide", initial_sidebar_state=200)
    st.logo(logo(), size="large")
    st.html(STYLE)
    # A page of its own, so that every page in the menu has an address, the first one too.
    home = st.Page(_home, title="bitatlas", default=True, visibility="hidden")
    menu: dict[str, list[st.Page]] = {"": [home]}
    for screen in SCREENS:
        page = st.Page(_drawn(screen), title=screen.title, icon=screen.icon, url_path=screen.address)
        menu.setdefault(screen.section, []).append(page)
        st.session_state.setdefault("_pages", {})[screen.name] = page
    chosen = st.navigation(menu, expanded=True)
    try:
        draw_frame()
        chosen.run()
    except UserError as e:
        error_box(e)


main()
