"""The parameter sets: shapes of real networks, and sizes and counts that show how the cost grows."""

from __future__ import annotations

from collections.abc import Iterator

Shape = tuple[int, ...]


def small() -> list[Shape]:
    """80 tensors, 166 thousand parameters: twenty layers of a matrix, its bias, and a norm's weight and bias."""
    return [(90, 89), (90,), (90,), (90,)] * 20


def resnet34() -> list[Shape]:
    """110 tensors, 21.3 million parameters: ResNet-34 (He et al. 2016) for 32x32 images and ten classes."""
    return list(_resnet34())


def _resnet34() -> Iterator[Shape]:
    yield from ((64, 3, 3, 3), (64,), (64,))
    channels_in = 64
    for channels, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for _ in range(blocks):
            yield from ((channels, channels_in, 3, 3), (channels,), (channels,))
            yield from ((channels, channels, 3, 3), (channels,), (channels,))
            if channels_in != channels:
                yield from ((channels, channels_in, 1, 1), (channels,), (channels,))
            channels_in = channels
    yield from ((10, 512), (10,))


def vit_b16() -> list[Shape]:
    """152 tensors, 86 million parameters: ViT-B/16 (Dosovitskiy et al. 2021) for 224x224 images and 1,000 classes."""
    width, mlp = 768, 3072
    attention = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    perceptron = [(width,), (width,), (mlp, width), (mlp,), (width, mlp), (width,)]
    stem = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return [*stem, *(attention + perceptron) * 12, (width,), (width,), (1000, width), (1000,)]


SETS = {
    "small": small(),
    "1000x256": [(256,)] * 1000,
    "resnet34": resnet34(),
    "vit-b16": vit_b16(),
    "110x1": [(1,)] * 110,
    **{f"flat-{n:.0e}".replace("e+0", "e"): [(int(n),)] for n in (1e4, 1e5, 1e6, 1e7, 1e8, 2e8)},
    **{f"{n}x256": [(256,)] * n for n in (1, 10, 100, 10_000)},
}
TITLES = {
    "small": "80 small tensors, 166 k",
    "1000x256": "1,000 tensors of 256",
    "resnet34": "ResNet-34, 21.3 M",
    "vit-b16": "ViT-B/16, 86.6 M",
    "flat-1e4": "one tensor of 10,000",
}


def elements(shapes: list[Shape]) -> int:
    """How many parameters there are in all."""
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total
