"""CIFAR-100 and Tiny ImageNet, read strictly from the formats they are published in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from benchmarks.files import UserError


@dataclass(frozen=True)
class Part:
    """Training or test images, uint8 (N, channels, height, width), and labels, int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray


def cifar100(folder: Path) -> tuple[Part, Part]:
    """CIFAR-100's binary version, train.bin and test.bin, with the labels of its 100 fine classes."""
    if (folder / "cifar-100-binary").is_dir():  # the folder inside the archive
        folder = folder / "cifar-100-binary"
    return _read_cifar100(folder / "train.bin"), _read_cifar100(folder / "test.bin")


def _read_cifar100(path: Path) -> Part:
    """Records of a coarse label's byte, a fine label's byte and 3x32x32 image bytes."""
    record = 2 + 3 * 32 * 32
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if len(content) == 0 or len(content) % record:
        raise UserError(f"{path}: {len(content)} bytes, expected a multiple of {record}: truncated or not CIFAR-100")
    records = content.reshape(-1, record)
    for name, labels, classes in (("coarse", records[:, 0], 20), ("fine", records[:, 1], 100)):
        if labels.max() >= classes:
            index = int(np.argmax(labels >= classes))
            raise UserError(
                f"{path}: {name} label {labels[index]} at index {index}, expected 0..{classes - 1}: not CIFAR-100"
            )
    return Part(records[:, 2:].reshape(-1, 3, 32, 32), records[:, 1].astype(np.int64))


def tiny_imagenet(folder: Path, most: int | None = None) -> tuple[Part, Part]:
    """Tiny ImageNet as its archive unpacks: classes numbered as in wnids.txt; its validation images are the test part.

    The labels of its own test images were never published. Grey images count as having three equal channels. `most`:
    so many images of a class and part are read, the first ones by name.
    """
    if (folder / "tiny-imagenet-200").is_dir():  # the folder inside the archive
        folder = folder / "tiny-imagenet-200"
    names = _lines(folder / "wnids.txt")
    train = {name: sorted((folder / "train" / name / "images").glob("*.JPEG")) for name in names}
    for name, paths in train.items():
        if not paths:
            raise UserError(f"{folder / 'train' / name / 'images'}: no JPEG images")
    annotations = folder / "val" / "val_annotations.txt"
    test: dict[str, list[Path]] = {name: [] for name in names}
    for number, line in enumerate(_lines(annotations), 1):
        image, _, rest = line.partition("\t")
        name = rest.partition("\t")[0]
        if name not in test:
            raise UserError(f"{annotations}: line {number} has class {name!r}, which wnids.txt does not")
        test[name].append(folder / "val" / "images" / image)
    return tuple(_decoded([paths[:most] for paths in part.values()]) for part in (train, test))  # type: ignore[return-value]


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    found = [line for line in lines if line]
    if not found:
        raise UserError(f"{path}: empty")
    return found


def _decoded(by_class: list[list[Path]]) -> Part:
    labels = [label for label, paths in enumerate(by_class) for _ in paths]
    images = np.empty((len(labels), 3, 64, 64), np.uint8)
    for place, path in enumerate(path for paths in by_class for path in paths):
        try:
            with Image.open(path) as file:
                pixels = np.asarray(file.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        if pixels.shape != (64, 64, 3):
            raise UserError(f"{path}: {pixels.shape[1]}x{pixels.shape[0]} pixels, expected 64x64: not Tiny ImageNet")
        images[place] = pixels.transpose(2, 0, 1)
    return Part(images, np.array(labels, np.int64))
