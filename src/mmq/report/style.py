"""How the report's plots look: colours, sizes, axes, legends.

Figures are made without pyplot, which would keep them in a global list. Colours are Okabe and Ito's, and viridis: both
can be told apart by colour-blind readers.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mmq.text import plain_number

Layers = Sequence[dict[str, Any]]
Array = np.ndarray[Any, np.dtype[Any]]

ORANGE, SKY, GREEN, BLUE, RED, PINK, GREY = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#777777"
LINES = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
STYLE: Any = {
    "font.size": 9.5,
    "figure.titlesize": 10.5,
    "figure.titleweight": "bold",
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    # Labels are text, whatever signs they hold.
    "text.parse_math": False,
}
# Inches. A plot fills half the page's width on a desk, or all of a telephone's, where its text is still legible.
WIDTH, HEIGHT, TALL = 4.9, 3.3, 4.3
WIDE, NARROW = 10.2, 3.9
DPI = 190
TITLE_CHARACTERS = 11.6  # in an inch
PERCENT = FuncFormatter(lambda value, _: f"{value:.4g}%")
P = ParamSpec("P")
T = TypeVar("T")


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw in this module's style; matplotlib reads it whenever something is made."""

    @functools.wraps(draw)
    def within(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return within


@styled
def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def empty_figure(title: str, size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(textwrap.fill(title, int(TITLE_CHARACTERS * size[0])), x=0.012, horizontalalignment="left")
    return figure


def new_figure(title: str, size: tuple[float, float] = (WIDTH, HEIGHT)) -> tuple[Figure, Axes]:
    figure = empty_figure(title, size)
    return figure, figure.add_subplot()


def layer_axis(axes: Axes, layers: Layers) -> Array:
    """The layers' numbers, with the axis set up for them."""
    x = np.array([layer["layer"] for layer in layers])
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.set_xlim(x[0] - 0.6, x[-1] + 0.6)
    return x


def marker(x: Array) -> str:
    """Few points need marks to be seen; many are a line."""
    return "o" if len(x) <= 40 else ""


def scale_axis(axes: Axes, values: Array) -> None:
    """Logarithmic where values differ by more than ten times, else from zero."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low > 0 and high / low > 10:
        axes.set_yscale("log")
        plain_log_axis(axes.yaxis, low, high)
    else:
        axes.set_ylim(min(0.0, low), high * 1.08 or 1.0)


def plain_log_axis(axis: Any, low: float, high: float) -> None:
    """Ticks at 1, 2 and 5 over few decades, else at powers of ten; plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    axis.set_minor_formatter(NullFormatter())


def add_legend(figure: Figure, handles: Sequence[tuple[Any, str]], columns: int = 4) -> None:
    """Below the plot, where nothing is covered."""
    if handles:
        figure.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=min(columns, len(handles)))
