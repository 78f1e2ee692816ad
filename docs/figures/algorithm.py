"""The pictures of docs/algorithm.md: `python -m docs.figures.algorithm` writes them beside this file.

Every point in them is one at which the library has been, on a loss of two weights: perturbed weights are read between
evaluations, fast ones are where a step of so many inner steps ends without interpolation. Transparent SVGs, in colours
that stand out from white and from the dark page alike (``tests/docs/test_figures.py`` measures how much).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.methods import METHODS
from benchmarks.style import STYLE
from lookbehind_fused import SAM, Lookbehind

INK = "#7F7F7F"  # halfway between white and the dark page
SLOW, FAST, PERTURBED = "#8C7A00", METHODS["sam"].colour, METHODS["lookbehind"].colour
K5 = "#B5527E"
READABLE = {
    **{f"{what}color": INK for what in ("text.", "xtick.", "xtick.label", "ytick.", "ytick.label")},
    **{"axes.edgecolor": INK, "axes.labelcolor": INK, "axes.grid": False, "font.size": 10},
    **{"svg.hashsalt": "lookbehind_fused", "savefig.transparent": True},
}
Loss = Callable[[Tensor], Tensor]
Point = tuple[float, float]
START: Point = (-1.15, 0.36)
SETTINGS = {"lr": 0.17, "rho": 0.33}
FLOOR = {"lr": 0.1, "rho": 0.4}
GRADIENTS = 240  # that each method of the second picture may take


class Step(NamedTuple):
    """Where one outer step has been: k + 1 points of evaluation, of which the first is slow, k fast points, and the new
    slow one.
    """

    perturbed: list[Point]
    fast: list[Point]
    after: Point


def bowl(w: Tensor) -> Tensor:
    """A minimum that is flatter in one direction. ``w`` has the shape (..., 2), the loss (...)."""
    x, y = w[..., 0], w[..., 1]
    return 0.25 * x.square() + 0.9 * y.square()


def widening(w: Tensor) -> Tensor:
    """A straight valley whose floor, y = 0, is a line of minima of loss 0 that grow flatter with x. ``w`` has the shape
    (..., 2), the loss (...).
    """
    x, y = w[..., 0], w[..., 1]
    return 0.5 * curvature(x) * y.square()


def curvature(x: Tensor) -> Tensor:
    """Of the floor of ``widening``, across: the larger eigenvalue of its Hessian."""
    return 0.25 + 2.5 * torch.sigmoid(-1.6 * x)


def point(w: Tensor) -> Point:
    """Its two numbers."""
    x, y = w.tolist()
    return x, y


def run(make: Callable[[list[Tensor]], torch.optim.Optimizer], loss: Loss, start: Point, steps: int) -> list[Point]:
    """The weights before and after each step of an optimizer, in float64."""
    w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = make([w])

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        return value

    points = [point(w)]
    for _ in range(steps):
        optimizer.step(closure)
        points.append(point(w))
    return points


def one_step(loss: Loss, start: Point, k: int, alpha: float, **settings: Any) -> Step:
    """One outer step of Lookbehind over SGD; ``settings`` are those of both."""
    w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = Lookbehind([w], torch.optim.SGD, k=k, alpha=alpha, **settings)
    perturbed = []
    for _ in optimizer.evaluations():
        perturbed.append(point(w))
        loss(w).backward()
    fast = [
        run(partial(Lookbehind, base_optimizer=torch.optim.SGD, k=i, alpha=1.0, **settings), loss, start, 1)[-1]
        for i in range(1, k + 1)
    ]
    return Step(perturbed, fast, point(w))


def contours(axes: Axes, loss: Loss, x: Point, y: Point, levels: Sequence[float]) -> None:
    """Lines of equal loss in the ranges ``x`` and ``y``; both axes have one scale, since distances are looked at."""
    across, up = (torch.linspace(*ends, 81, dtype=torch.float64) for ends in (x, y))
    grid = torch.stack(torch.meshgrid(across, up, indexing="xy"), dim=-1)
    axes.contour(across, up, loss(grid), levels=levels, colors=INK, linewidths=0.7, alpha=0.45, linestyles="solid")
    axes.set_aspect("equal")
    axes.set(xlim=x, ylim=y, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def arrow(axes: Axes, start: Point, end: Point, colour: str, **more: Any) -> None:
    """From one point to another, but for the room of their marks."""
    style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 4, "shrinkB": 4, "mutation_scale": 11, **more}
    axes.annotate("", end, start, arrowprops=style)


def label(axes: Axes, at: Point, text: str, colour: str, offset: tuple[float, float]) -> None:
    """A word beside a point, ``offset`` in points of print."""
    side = "left" if offset[0] > 0 else "right"
    axes.annotate(text, at, offset, textcoords="offset points", color=colour, ha=side, va="center")


def draw_step() -> Figure:
    """Slow, fast and perturbed weights of one outer step."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    step = one_step(bowl, START, 3, 0.5, **SETTINGS)
    contours(axes, bowl, (-2.3, 0.75), (-0.7, 1.3), [0.02, 0.1, 0.25, 0.5, 0.85, 1.3, 1.9])
    slow, behind = step.perturbed[0], step.perturbed[1:]
    for start, end in zip(step.perturbed, behind, strict=False):
        arrow(axes, start, end, PERTURBED, linewidth=1.6)
    for start, end in zip([slow, *step.fast], step.fast, strict=False):
        arrow(axes, start, end, FAST, linewidth=1.6)
    for start, end in zip(behind, step.fast, strict=True):
        arrow(axes, start, end, INK, linewidth=0.9, linestyle=(0, (3, 3)), connectionstyle="arc3,rad=0.22")
    arrow(axes, slow, step.after, SLOW, linewidth=2.4)
    for points, colour in ((behind, PERTURBED), (step.fast, FAST), ([slow, step.after], SLOW)):
        axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=6.5)
    label(axes, slow, "slow", SLOW, (10, 8))
    label(axes, step.after, "slow + α (fast₃ − slow)", SLOW, (-11, -6))
    for i, (up, down) in enumerate(zip(behind, step.fast, strict=True)):
        label(axes, up, "perturbed" + "₁₂₃"[i], PERTURBED, (10, 6))
        label(axes, down, "fast" + "₁₂₃"[i], FAST, (9, 3))
    axes.plot(0, 0, "+", color=INK, markersize=9)
    label(axes, (0, 0), "minimum", INK, (9, 0))
    return figure


def draw_floor() -> Figure:
    """Where methods get to along a floor of minima with the same number of gradients, and how sharp it is there."""
    figure = Figure(figsize=(8.2, 3.1), layout="constrained")
    floor, sharpness = figure.subplots(1, 2, width_ratios=(1.25, 1))
    contours(floor, widening, (-1.8, 0.4), (-0.62, 1.0), [0.01, 0.05, 0.15, 0.35, 0.7, 1.2])
    floor.axhline(0, color=INK, linewidth=0.8, linestyle=(0, (5, 4)))
    for method, (colour, cost, points) in along_the_floor().items():
        x = torch.tensor(points, dtype=torch.float64)[:, 0]
        gradients = [cost * step for step in range(len(points))]
        sharpness.plot(gradients, curvature(x), color=colour, linewidth=1.6)
        label(sharpness, (gradients[-1], float(curvature(x[-1]))), method, colour, (5, 0))
        if "5" in method:  # whose way would hide the others'
            continue
        floor.plot(*zip(*points, strict=True), color=colour, linewidth=0.9, marker="o", markersize=2)
        floor.plot(*points[-1], "o", color=colour, markersize=8)
        floor.annotate(method, points[-1], (0, -26), textcoords="offset points", color=colour, ha="center", va="center")
    label(floor, points[0], "start", INK, (9, 3))
    sharpness.set(xlabel="gradients", ylabel="curvature of the loss", ylim=(0, None), xlim=(0, GRADIENTS))
    return figure


def along_the_floor() -> dict[str, tuple[str, int, list[Point]]]:
    """By what the picture calls a method: its colour, its gradients a step, the weights before and after each step."""
    sgd = partial(torch.optim.SGD, lr=FLOOR["lr"])
    behind = {"base_optimizer": torch.optim.SGD, **FLOOR}
    methods: dict[str, tuple[str, int, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
        "SGD": (METHODS["sgd"].colour, 1, sgd),
        "SAM": (METHODS["sam"].colour, 2, partial(SAM, **behind)),
        "Lookbehind, k = 2": (METHODS["lookbehind"].colour, 3, partial(Lookbehind, k=2, alpha=0.5, **behind)),
        "Lookbehind, k = 5": (K5, 6, partial(Lookbehind, k=5, alpha=0.5, **behind)),
    }
    return {
        name: (colour, cost, run(make, widening, (-1.5, 0.9), GRADIENTS // cost))
        for name, (colour, cost, make) in methods.items()
    }


def draw() -> dict[str, bytes]:
    """SVGs by file name."""
    pictures = {}
    with rc_context({**STYLE, **READABLE}):
        for name, make in (("one-step.svg", draw_step), ("flat-floor.svg", draw_floor)):
            with io.BytesIO() as file:
                make().savefig(file, format="svg", metadata={"Date": None})
                pictures[name] = file.getvalue()
    return pictures


def main() -> None:
    """Write them."""
    for name, picture in draw().items():
        (Path(__file__).parent / name).write_bytes(picture)


if __name__ == "__main__":
    main()
