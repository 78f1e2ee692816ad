"""Real images, read strictly from the formats they are published in, as standardised tensors."""

import gzip
import hashlib
import random
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.files import UserError

FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"  # where Debian's package puts it
CLASSES = 10  # in every data set here


@dataclass(frozen=True)
class Dataset:
    """Images, float32 (N, channels, height, width), and labels, int64 (N,) in 0..9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> "Dataset":
        """The same data on `device`."""
        return Dataset(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def fingerprint(self) -> str:
        """SHA-256 of every image and label, in hex: equal only for the same data in the same order."""
        digest = hashlib.sha256()
        for name, tensor in vars(self).items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def load(name: str, folder: str | None = None, limit: int | None = None) -> Dataset:
    """Reads `digits`, `fashion-mnist` or `cifar10`.

    Each channel is scaled to mean 0 and variance 1 over the training images. `folder` holds the files (digits has none:
    they come with scikit-learn). `limit` keeps only the first images of each part. Raises UserError for a missing,
    truncated or foreign file, naming it.
    """
    if name == "digits":
        if folder is not None:
            raise UserError("--data-dir: digits come with scikit-learn and are read from no folder")
        arrays = _digits()
    elif name == "fashion-mnist":
        arrays = _fashion_mnist(Path(folder or FASHION_MNIST_DIR))
    elif name == "cifar10":
        if folder is None:
            raise UserError("--data cifar10 needs --data-dir: the folder of data_batch_1.bin ... test_batch.bin")
        arrays = _cifar10(Path(folder))
    else:
        raise UserError(f"--data: expected digits, fashion-mnist or cifar10, got {name!r}")

    train_images, train_labels, test_images, test_labels = (array[:limit] for array in arrays)
    train = torch.from_numpy(train_images.astype(np.float32))
    test = torch.from_numpy(test_images.astype(np.float32))
    std, mean = torch.std_mean(train.double(), dim=(0, 2, 3), correction=0, keepdim=True)
    std = std.clamp(min=1e-6)  # a channel of one value stays finite
    return Dataset(
        ((train - mean) / std).float(),
        torch.from_numpy(train_labels.astype(np.int64)),
        ((test - mean) / std).float(),
        torch.from_numpy(test_labels.astype(np.int64)),
    )


def with_label_noise(data: Dataset, fraction: float, seed: int) -> Dataset:
    """Symmetric noise: `fraction` of the training labels, rounded to a whole number, become another class.

    Any other class is as likely, so every label that was chosen is wrong. The test labels stay as they are.
    """
    generator = seeded_generator(seed, "label noise")
    labels = data.train_labels.clone()
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    labels[chosen] += torch.randint(1, CLASSES, (len(chosen),), generator=generator)
    return replace(data, train_labels=labels % CLASSES)


def seeded_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator of its own for each seed and purpose, so that no draw depends on how many came before it."""
    key = "/".join(map(str, (seed, *purpose)))
    return torch.Generator().manual_seed(random.Random(key).getrandbits(63))


def _digits() -> tuple[np.ndarray, ...]:
    """1,797 grey 8x8 images. The test part is every fourth image of each class, whatever the seed."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(CLASSES):
        is_test[np.flatnonzero(labels == label)[::4]] = True
    return images[~is_test], labels[~is_test], images[is_test], labels[is_test]


def _fashion_mnist(folder: Path) -> tuple[np.ndarray, ...]:
    """Fashion-MNIST (or MNIST, whose files are alike) from its four IDX files, gzipped or not."""
    parts: list[np.ndarray] = []
    for part in ("train", "t10k"):
        images_path = _find_idx(folder, f"{part}-images-idx3-ubyte")
        labels_path = _find_idx(folder, f"{part}-labels-idx1-ubyte")
        images = _read_idx(images_path, dimensions=3)[:, None]
        labels = _read_idx(labels_path, dimensions=1)
        if len(images) != len(labels):
            raise UserError(f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}")
        _check_labels(labels, labels_path)
        parts += [images, labels]
    if parts[0].shape[1:] != parts[2].shape[1:]:
        raise UserError(f"{folder}: training images are {_size(parts[0])} pixels, test images {_size(parts[2])}")
    return tuple(parts)


def _find_idx(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(
        f"{folder / name}[.gz]: no such file; name its folder with --data-dir or install Debian's dataset-fashion-mnist"
    )


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes: magic number, one big-endian 32-bit length a dimension, then the bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions:
                raise UserError(f"{path}: truncated, only {len(header)} bytes")
            magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
            if magic != 0x0800 + dimensions:
                raise UserError(f"{path}: magic number {magic:#010x}, expected {0x0800 + dimensions:#010x}")
            size = int(np.prod(shape, dtype=object))
            if size == 0:
                raise UserError(f"{path}: empty, its header says {'x'.join(map(str, shape))}")
            # A byte more than there should be shows a file that is too long. Small blocks, for a header that lies.
            content = bytearray()
            while len(content) <= size and (block := file.read(min(size + 1 - len(content), 1 << 20))):
                content += block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: truncated or not gzip ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if len(content) != size:
        found = "more" if len(content) > size else f"only {len(content)}"
        raise UserError(f"{path}: expected {size} bytes after the header, found {found}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _cifar10(folder: Path) -> tuple[np.ndarray, ...]:
    """CIFAR-10's binary version: in each file, records of one label byte and 3x32x32 image bytes."""
    if (folder / "cifar-10-batches-bin").is_dir():  # the folder inside the archive
        folder = folder / "cifar-10-batches-bin"
    paths = [folder / f"data_batch_{i}.bin" for i in range(1, 6)] + [folder / "test_batch.bin"]
    batches = [_read_cifar10(path) for path in paths]
    for path, (labels, _) in zip(paths, batches, strict=True):
        # The six files are equally long, which also finds one that was cut between two records.
        longest = max(len(other) for other, _ in batches)
        if len(labels) != longest:
            raise UserError(f"{path}: truncated, {len(labels)} images where the other batches have {longest}")
    train_labels, train_images = (np.concatenate(arrays) for arrays in zip(*batches[:5], strict=True))
    test_labels, test_images = batches[5]
    return train_images, train_labels, test_images, test_labels


def _read_cifar10(path: Path) -> tuple[np.ndarray, np.ndarray]:
    record = 1 + 3 * 32 * 32
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if len(content) == 0 or len(content) % record:
        raise UserError(f"{path}: {len(content)} bytes, expected a multiple of {record}: truncated or not CIFAR-10")
    records = content.reshape(-1, record)
    labels = records[:, 0]
    _check_labels(labels, path)
    return labels, records[:, 1:].reshape(-1, 3, 32, 32)


def _check_labels(labels: np.ndarray, path: Path) -> None:
    if labels.max() >= CLASSES:
        index = int(np.argmax(labels >= CLASSES))
        raise UserError(f"{path}: label {labels[index]} at index {index}, expected 0..{CLASSES - 1}")


def _size(images: np.ndarray) -> str:
    return f"{images.shape[2]}x{images.shape[3]}"
