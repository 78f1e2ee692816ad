"""What a step of the optimizer's own work would take on GPUs that nobody has measured it on: predictions.

A step of SGD with momentum, k = 2, static alpha, float32, moves 68 bytes a parameter in 6 launches (DESIGN section 3).

    device = bytes * parameters / (share * bandwidth) + launches * gap
    eager step = max(device, host + launches * launch)          # the host runs ahead as far as it can
    captured step = device + replay

``bandwidth`` is what the vendor states, ``share`` how much of it a large copy reaches (assumed: 0.9, and that the
passes reach what a copy does: an H200 has shown 0.94 to 0.96), ``gap`` between two kernels on the device,
``launch`` what one costs the host beside Python, ``replay`` of one graph: assumed. ``host`` is measured where this
runs, with launches that do nothing (``benchmarks.bench.host``): a server's processor may be twice as fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

BYTES, LAUNCHES = 68, 6
SHARE = 0.9
GAP, LAUNCH, REPLAY = 2e-6, 5e-6, 10e-6  # seconds
BANDWIDTH = {"A100 80 GB SXM": 2.039e12, "H100 SXM": 3.35e12, "H200 SXM": 4.8e12, "B200": 8e12, "RTX 4090": 1.008e12}
"""Bytes a second, as the vendor states them in its data sheets."""
DEVICES = {
    "NVIDIA A100-SXM4-80GB": "A100 80 GB SXM",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H200": "H200 SXM",
    "NVIDIA B200": "B200",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
}
"""What ``torch.cuda.get_device_name`` calls them."""
MODELS = {"ResNet-50, 25 M": (25_000_000, 161), "200 M": (200_000_000, 161)}
"""Parameters and tensors."""


class Prediction(NamedTuple):
    """Seconds of a step: the kernels alone, eager, and captured as a graph."""

    device: float
    eager: float
    captured: float


def predicted(parameters: int, bandwidth: float, host: float) -> Prediction:
    """By the formula above.

    Args:
        bandwidth: in bytes a second. host: seconds of a step with launches that do nothing.
    """
    device = BYTES * parameters / (SHARE * bandwidth) + LAUNCHES * GAP
    return Prediction(device, max(device, host + LAUNCHES * LAUNCH), device + REPLAY)


def table(host: Mapping[int, float]) -> str:
    """All GPUs and models, as Markdown; ``host``: seconds of a step by the number of tensors."""
    lines = [
        "| predicted, not measured: milliseconds a step | " + " | ".join(MODELS) + " |",
        "|---|" + "---|" * len(MODELS),
    ]
    for name, bandwidth in BANDWIDTH.items():
        cells = []
        for parameters, tensors in MODELS.values():
            found = predicted(parameters, bandwidth, host[tensors])
            cells.append(f"{1e3 * found.eager:.2f}, captured {1e3 * found.captured:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    measured = ", ".join(f"{1e6 * seconds:.0f} us over {tensors} tensors" for tensors, seconds in host.items())
    return "\n".join([*lines, "", f"The host's share, measured here: {measured}."])
