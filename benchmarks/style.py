"""How all pictures of these folders look."""

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

INK = "#262626"
FAINT = "#8C8C8C"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#BFBFBF",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#EBEBEB",
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}
HEAD = {"loc": "left", "size": 10.5, "weight": "bold", "pad": 8}


def canvas(width: float, height: float, title: str, subtitle: str, legend: bool = True) -> Figure:
    """A figure in inches with its two titles, and room for a note and a legend below."""
    figure = Figure(figsize=(width, height), layout="constrained")
    bottom, top = (0.56 if legend else 0.26) / height, 0.62 / height  # in inches: the legend and a note, the titles
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06, rect=(0, bottom, 1, 1 - top - bottom))
    figure.text(0.012, 1 - 0.1 / height, title, size=13, weight="bold", va="top")
    figure.text(0.012, 1 - 0.38 / height, subtitle, size=9, color="#5A5A5A", va="top")
    return figure
