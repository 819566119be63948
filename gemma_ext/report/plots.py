"""Figures of pages: matplotlib in one style, as SVG inside the page."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from gemma_ext.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY, BLUE, INK = "#9aa5b1", "#1a73e8", "#202833"
_STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": "#c5ccd3",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def axes(
    rows: int, columns: int, inches: tuple[float, float], **options: Any
) -> tuple[Figure, Any]:
    """A figure and its axes; options as of `Figure.subplots`.

    Raises:
        ImportError: matplotlib is missing.
    """
    require("gemma_ext.report", "merge", "matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        return figure, figure.subplots(rows, columns, **options)


def svg(figure: Figure, description: str) -> str:
    """The figure as an element of a page; `description` is for readers who do not see it."""
    import matplotlib
    from markupsafe import escape

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
