"""The pictures of the documentation: that their points are the algorithm's, and that they can be read on both pages."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from docs.figures import algorithm
from tests.algorithm1 import algorithm1

PAGES = {"white": "#FFFFFF", "the dark page of mkdocs-material": "#1E2129"}


def gradient(loss, w):
    w = w.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(w), w)[0]


def test_the_points_of_one_step_are_those_of_algorithm_1():
    step = algorithm.one_step(algorithm.bowl, algorithm.START, 3, 0.5, **algorithm.SETTINGS)
    seen, fast = [], []

    def evaluate(points, index):
        seen.append(algorithm.point(points[0]))
        return [gradient(algorithm.bowl, points[0])]

    def sgd(weights, gradients):
        moved = [w - algorithm.SETTINGS["lr"] * g for w, g in zip(weights, gradients, strict=True)]
        fast.append(algorithm.point(moved[0]))
        return moved

    start = [torch.tensor(algorithm.START, dtype=torch.float64)]
    outcome = algorithm1(start, evaluate, sgd, k=3, rho=algorithm.SETTINGS["rho"], alpha=0.5)
    for found, expected in ((step.perturbed, seen), (step.fast, fast), ([step.after], [outcome.params[0].tolist()])):
        found, expected = (torch.tensor(points, dtype=torch.float64) for points in (found, expected))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_what_the_second_picture_shows():
    """Each method takes as many gradients, and those that look further behind end where the floor is flatter."""
    ends = {}
    for name, (_, cost, points) in algorithm.along_the_floor().items():
        assert cost * (len(points) - 1) == algorithm.GRADIENTS
        ends[name] = float(algorithm.curvature(torch.tensor(points[-1][0])))
    assert list(ends) == sorted(ends, key=ends.__getitem__, reverse=True)
    assert ends["SGD"] > 2.5
    assert ends["Lookbehind, k = 5"] < 0.35


def test_curvature_is_that_of_the_loss():
    x = torch.tensor(0.3, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(algorithm.widening, torch.stack([x, torch.zeros_like(x)]))
    torch.testing.assert_close(torch.linalg.eigvalsh(hessian)[-1], algorithm.curvature(x))


def luminance(colour):
    """Relative, as WCAG 2.1 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_colour_stands_out_from_both_pages():
    """By 3 to 1, which WCAG 2.1 asks of graphics and large text (1.4.3, 1.4.11); nothing is filled behind it."""
    pictures = algorithm.draw()
    assert set(pictures) == {path.name for path in Path(algorithm.__file__).parent.glob("*.svg")}
    for name, picture in pictures.items():
        colours = set(re.findall(rb"#[0-9a-f]{6}", picture))
        assert len(colours) >= 4, name
        for colour in colours:
            for page, ground in PAGES.items():
                light, dark = sorted(map(luminance, (colour.decode(), ground)), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 3, f"{name}: {colour.decode()} on {page}"
