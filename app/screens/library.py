"""Library: which models and studies there are, and how complete."""

from __future__ import annotations

from bitatlas.app.widgets.boxes import empty_state
from bitatlas.app.widgets.data import get_studies
from bitatlas.app.widgets.frame import title

__all__ = ["page"]


def page() -> None:
    """Draw the page."""
    infos = get_studies()
    if not infos:
        title("No model here yet")
        empty_state("Models and what was measured on them will stand here.", "Open the sample study")
        return
    title(f"{len(infos)} models")
