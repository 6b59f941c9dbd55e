"""One look for every figure of the course.

    use_style()  ->  white ground, thin grid, Okabe-Ito colours in a fixed order
    COLORS       ->  those colours by name: COLORS["blue"]
    HATCHES      ->  one hatch for each colour, so a print in black and white can still be read
    fill()       ->  how an area is drawn: colour, hatch, and a hatch ink that can be seen on it
    cjk_font()   ->  name of an installed font with Chinese glyphs, or None
    describe()   ->  words for those who cannot see the figure

Okabe and Ito's eight colours (https://jfly.uni-koeln.de/color/, 2008) stay apart for readers with any of the
common kinds of colour blindness. Colour is never the only sign: areas also carry a hatch or a label.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
from IPython.core.getipython import get_ipython
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermillion": "#D55E00",
    "sky": "#56B4E9",
    "purple": "#CC79A7",
    "yellow": "#F0E442",
    "black": "#000000",
    "grey": "#999999",
    "light": "#DDDDDD",
    "dark": "#4D4D4D",
}
"""Okabe-Ito colours by name, and three greys. To the colour-blind, "grey" may look as "green" and "purple" do."""

CYCLE = ["blue", "orange", "green", "vermillion", "sky", "purple", "yellow", "black"]
"""Order in which lines and bars take their colours."""

HATCHES = ["", "//", "..", "\\\\", "xx", "--", "++", "oo"]
"""Hatches in the same order as CYCLE."""

# Families that carry the common Chinese glyphs, free ones first.
CJK_FAMILIES = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Noto Serif CJK SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
    "Noto Sans CJK JP",
)


def cjk_font() -> str | None:
    """Name of the first installed font family that has Chinese glyphs, or None.

    Use it as `fontfamily=cjk_font()` where it is a name; where it is None, draw ids instead of Chinese text.
    """
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((family for family in CJK_FAMILIES if family in installed), None)


def use_style() -> None:
    """Set the course's look for every figure made afterwards in this process."""
    mpl.rcParams.update(
        {
            "figure.figsize": (7.5, 3.6),
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": mpl.cycler(color=[COLORS[name] for name in CYCLE]),  # type: ignore[attr-defined]
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.labelsize": 10,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": COLORS["light"],
            "grid.linewidth": 0.6,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "hatch.linewidth": 0.6,
            "font.size": 10,
        }
    )


def ink(color: str) -> str:
    """ "black" or "white", whichever can be seen better on the colour of this name."""
    parts = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in to_rgb(COLORS[color]))
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    # Contrast as WCAG 2.1 counts it: the lighter of two over the darker, each with 0.05 added.
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


def fill(color: str, hatch: str = "") -> dict[str, Any]:
    """How an area is drawn: arguments for a patch, with an edge and a hatch that stand out from the colour."""
    return {"facecolor": COLORS[color], "hatch": hatch, "edgecolor": ink(color), "linewidth": 0.5}


def describe(axes: Axes, text: str) -> None:
    """Give the figure of `axes` an alternative text, which notebooks keep beside the picture and pages show as `alt`.

    A figure whose axes were described one by one has all their texts, in the order of the axes.

    Args:
        axes: any axes of the figure.
        text: what the picture shows, with its numbers.
    """
    figure: Any = axes.figure
    of_axes: Any = axes
    of_axes.alternative_text = text
    texts = [getattr(each, "alternative_text", "") for each in figure.axes]
    figure.alternative_text = " ".join(filter(None, texts))
    shell: Any = get_ipython()
    if shell is None:
        return
    formatter = shell.display_formatter.formatters["image/png"]
    # The inline backend registers its own printer when the first figure is made, and again when its settings change.
    printer = formatter.lookup_by_type(Figure)
    if getattr(printer, "func", None) is not _with_text:
        formatter.for_type(Figure, partial(_with_text, printer))


def _with_text(printer: Any, figure: Any) -> Any:
    printed = printer(figure)
    text = getattr(figure, "alternative_text", None)
    if text is None or printed is None:
        return printed
    data, about = printed if isinstance(printed, tuple) else (printed, {})
    return data, {**about, "alt": text}


def label_bars(axes: Axes, values: Sequence[float], form: str = "{:.2f}") -> None:
    """Write each value just above its vertical bar.

    Args:
        axes: the axes that hold one bar for each value, at positions 0, 1, 2 ...
        values: heights of the bars.
        form: format string for one value.
    """
    for place, value in enumerate(values):
        axes.annotate(form.format(value), (place, value), (0, 2), textcoords="offset points", ha="center")
