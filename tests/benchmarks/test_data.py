"""The data loaders of the main job, on files written here: what they read, and what they refuse."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import data
from benchmarks.files import UserError

IDX_IMAGES = "{}-images-idx3-ubyte"
IDX_LABELS = "{}-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file of unsigned bytes."""
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, train: int = 30, test: int = 20, size: int = 28, zipped: bool = False) -> dict:
    """Writes the four files of an MNIST-like data set and returns the arrays by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    arrays = {}
    for part, count in (("train", train), ("t10k", test)):
        arrays[IDX_IMAGES.format(part)] = random.integers(0, 256, (count, size, size), np.uint8)
        arrays[IDX_LABELS.format(part)] = random.permutation(np.arange(count, dtype=np.uint8) % 10)
    for name, array in arrays.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


def write_cifar10(folder: Path, records: int = 8) -> dict:
    """Writes the six batches of CIFAR-10's binary version and returns (labels, images) by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(2)
    batches = {}
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        labels = random.integers(0, 10, records, np.uint8)
        images = random.integers(0, 256, (records, 3, 32, 32), np.uint8)
        # The published layout: one label byte, 1024 red, 1024 green, 1024 blue bytes, row by row.
        content = b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))
        (folder / name).write_bytes(content)
        batches[name] = labels, images
    return batches


def standardised(train: np.ndarray, images: np.ndarray) -> torch.Tensor:
    """By the textbook, in float64: each channel minus its mean over `train`, over its standard deviation."""
    mean = train.astype(np.float64).mean((0, 2, 3), keepdims=True)
    std = train.astype(np.float64).std((0, 2, 3), keepdims=True)
    return torch.from_numpy((images.astype(np.float64) - mean) / std)


def assert_same(images: torch.Tensor, expected: torch.Tensor) -> None:
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=2e-6)


# Digits


def test_digits_are_all_there_and_split_by_class():
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    assert digits.train_images.shape == (1343, 1, 8, 8)
    assert digits.test_images.shape == (454, 1, 8, 8)
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    labels = torch.cat([digits.train_labels, digits.test_labels])
    assert torch.bincount(labels).tolist() == np.bincount(load_digits().target).tolist()
    share = torch.bincount(digits.test_labels) / torch.bincount(labels)
    assert ((share >= 0.25) & (share < 0.26)).all()

    # Each of the published images is in exactly one of the two parts, under its own label.
    images, targets = load_digits(return_X_y=True)
    train = images[_positions(images, targets, digits.train_images, digits.train_labels)].reshape(-1, 1, 8, 8)
    assert_same(digits.train_images, standardised(train, train))
    used = np.concatenate(
        [
            _positions(images, targets, digits.train_images, digits.train_labels),
            _positions(images, targets, digits.test_images, digits.test_labels),
        ]
    )
    assert sorted(used) == list(range(1797))


def _positions(images: np.ndarray, targets: np.ndarray, wanted: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Where each wanted (scaled) image is among the published ones: the nearest after scaling, with the same label."""
    train = data.load("digits").train_images.flatten(1)
    assert abs(train.double().mean()) < 1e-6
    published = torch.from_numpy(images)
    # An affine map of all pixels keeps the pattern: subtract each image's mean and divide by its norm.
    patterns = [x - x.mean(1, keepdim=True) for x in (published, wanted.flatten(1).double())]
    ours, theirs = (x / x.norm(dim=1, keepdim=True) for x in reversed(patterns))
    similarity, position = (ours @ theirs.T).max(1)
    assert similarity.min() > 1 - 1e-6
    assert (torch.from_numpy(targets)[position] == labels).all()
    return position.numpy()


def test_digits_take_no_folder():
    with pytest.raises(UserError, match="--data-dir"):
        data.load("digits", "somewhere")


# Fashion-MNIST


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_fashion_mnist_reads_idx_files(tmp_path, zipped):
    arrays = write_idx(tmp_path, zipped=zipped)
    loaded = data.load("fashion-mnist", str(tmp_path))
    train, test = (arrays[IDX_IMAGES.format(part)][:, None] for part in ("train", "t10k"))
    assert_same(loaded.train_images, standardised(train, train))
    assert_same(loaded.test_images, standardised(train, test))
    assert loaded.train_labels.tolist() == arrays[IDX_LABELS.format("train")].tolist()
    assert loaded.test_labels.tolist() == arrays[IDX_LABELS.format("t10k")].tolist()


def test_limit_takes_the_first_images_and_scales_by_them(tmp_path):
    arrays = write_idx(tmp_path)
    loaded = data.load("fashion-mnist", str(tmp_path), limit=7)
    train, test = (arrays[IDX_IMAGES.format(part)][:7, None] for part in ("train", "t10k"))
    assert_same(loaded.train_images, standardised(train, train))
    assert_same(loaded.test_images, standardised(train, test))
    assert len(loaded.train_labels) == len(loaded.test_labels) == 7


def test_constant_images_stay_finite(tmp_path):
    write_idx(tmp_path)
    for part, count in (("train", 30), ("t10k", 20)):
        (tmp_path / IDX_IMAGES.format(part)).write_bytes(idx(np.full((count, 28, 28), 9, np.uint8)))
    loaded = data.load("fashion-mnist", str(tmp_path))
    assert (loaded.train_images == 0).all()
    assert (loaded.test_images == 0).all()


IMAGES = idx(np.zeros((30, 28, 28), np.uint8))
LABELS = idx(np.zeros(30, np.uint8))
WRONG_FILES = {
    "no header": (IMAGES[:9], "truncated, only 9 bytes"),
    "empty file": (b"", "truncated, only 0 bytes"),
    "truncated": (IMAGES[:-1], "found only 23519"),
    "too long": (IMAGES + b"\0", "found more"),
    "labels where images belong": (LABELS, "magic number 0x00000801, expected 0x00000803"),
    "another type": (b"\0\0\x0d\3" + IMAGES[4:], "magic number 0x00000d03"),
    "little-endian": (IMAGES[3::-1] + IMAGES[4:], "magic number 0x03080000"),
    "no images": (struct.pack(">4I", 0x0803, 0, 28, 28), "empty"),
    "a header that lies": (struct.pack(">4I", 0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1) + b"\0" * 99, "found only 99"),
    "fewer images than labels": (idx(np.zeros((29, 28, 28), np.uint8)), "30 labels for the 29 images"),
    "another size": (idx(np.zeros((30, 27, 28), np.uint8)), "training images are 27x28 pixels, test images 28x28"),
}


@pytest.mark.parametrize(("content", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_wrong_idx_images_are_named(tmp_path, content, message, zipped):
    write_idx(tmp_path, zipped=zipped)
    name = IDX_IMAGES.format("train")
    if zipped:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        data.load("fashion-mnist", str(tmp_path))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-9], lambda content: content[: len(content) // 2], lambda content: b"not gzip at all"],
    ids=["without its end", "half", "not gzip"],
)
def test_damaged_gzip_is_named(tmp_path, damage):
    write_idx(tmp_path, zipped=True)
    path = tmp_path / f"{IDX_IMAGES.format('t10k')}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte.gz: truncated or not gzip"):
        data.load("fashion-mnist", str(tmp_path))


def test_gzip_with_a_flipped_bit_is_refused(tmp_path):
    write_idx(tmp_path, zipped=True)
    path = tmp_path / f"{IDX_IMAGES.format('train')}.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz"):
        data.load("fashion-mnist", str(tmp_path))


def test_label_out_of_range_is_named(tmp_path):
    arrays = write_idx(tmp_path)
    labels = arrays[IDX_LABELS.format("t10k")].copy()
    labels[13] = 10
    (tmp_path / IDX_LABELS.format("t10k")).write_bytes(idx(labels))
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte: label 10 at index 13, expected 0\.\.9"):
        data.load("fashion-mnist", str(tmp_path))


@pytest.mark.parametrize("name", [IDX_IMAGES.format("train"), IDX_LABELS.format("t10k")])
def test_missing_idx_file_is_named(tmp_path, name):
    write_idx(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name}.*no such file.*--data-dir"):
        data.load("fashion-mnist", str(tmp_path))


def test_the_real_fashion_mnist():
    if not Path(data.FASHION_MNIST_DIR).is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    real = data.load("fashion-mnist")
    assert real.train_images.shape == (60_000, 1, 28, 28)
    assert real.test_images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(real.train_labels).tolist() == [6_000] * 10
    assert torch.bincount(real.test_labels).tolist() == [1_000] * 10
    assert real.train_labels[:8].tolist() == [9, 0, 0, 3, 0, 2, 7, 2]  # as published
    assert abs(real.train_images.double().mean()) < 1e-6
    assert abs(real.train_images.double().std(correction=0) - 1) < 1e-6


# CIFAR-10


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-bin"])
def test_cifar10_reads_binary_batches(tmp_path, subfolder):
    batches = write_cifar10(tmp_path / subfolder)
    loaded = data.load("cifar10", str(tmp_path))
    *train_batches, (test_labels, test_images) = batches.values()
    train_images = np.concatenate([images for _, images in train_batches])
    assert_same(loaded.train_images, standardised(train_images, train_images))
    assert_same(loaded.test_images, standardised(train_images, test_images))
    assert loaded.train_labels.tolist() == np.concatenate([labels for labels, _ in train_batches]).tolist()
    assert loaded.test_labels.tolist() == test_labels.tolist()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "expected a multiple of 3073"),
        (lambda content: content[:-3073], "truncated, 7 images where the other batches have 8"),
        (lambda content: b"", "0 bytes"),
        (lambda content: content[: 2 * 3073] + b"\x0a" + content[2 * 3073 + 1 :], "label 10 at index 2"),
    ],
    ids=["one byte short", "one record short", "empty", "label"],
)
@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
def test_wrong_cifar10_batch_is_named(tmp_path, name, damage, message):
    write_cifar10(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(UserError) as error:
        data.load("cifar10", str(tmp_path))
    assert message in str(error.value)
    assert name in str(error.value)


def test_cifar10_without_a_folder_or_a_batch(tmp_path):
    with pytest.raises(UserError, match="--data-dir"):
        data.load("cifar10")
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_5.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_5\.bin: No such file"):
        data.load("cifar10", str(tmp_path))


# Label noise and fingerprints


@pytest.mark.parametrize(("fraction", "wrong"), [(0.0, 0), (0.1, 134), (0.5, 672), (1.0, 1343)])
def test_label_noise_changes_exactly_its_fraction(fraction, wrong):
    clean = data.load("digits")
    labels = clean.train_labels.clone()
    noisy = data.with_label_noise(clean, fraction, seed=3)
    assert (noisy.train_labels != labels).sum() == wrong
    assert ((noisy.train_labels >= 0) & (noisy.train_labels <= 9)).all()
    assert torch.equal(noisy.test_labels, clean.test_labels)
    assert torch.equal(clean.train_labels, labels)
    assert noisy.train_images is clean.train_images


def test_label_noise_is_symmetric_and_follows_the_seed():
    clean = data.load("digits")
    noisy = data.with_label_noise(clean, 1.0, seed=0)
    moved = (noisy.train_labels - clean.train_labels) % 10
    # 1,343 draws from 9 classes: 149 each, standard deviation 11.5
    counts = torch.bincount(moved, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 149 - 5 * 11.5
    assert counts[1:].max() < 149 + 5 * 11.5
    assert torch.equal(
        data.with_label_noise(clean, 0.5, 1).train_labels, data.with_label_noise(clean, 0.5, 1).train_labels
    )
    assert (
        data.with_label_noise(clean, 0.5, 1).train_labels != data.with_label_noise(clean, 0.5, 2).train_labels
    ).any()


def test_label_noise_ignores_and_leaves_the_global_generator():
    clean = data.load("digits")
    torch.manual_seed(5)
    first = data.with_label_noise(clean, 0.5, 1).train_labels
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(data.with_label_noise(clean, 0.5, 1).train_labels, first)


@pytest.mark.parametrize("part", ["train_images", "train_labels", "test_images", "test_labels"])
def test_fingerprint_shows_any_change(part):
    original = data.load("digits", limit=50).fingerprint()
    assert data.load("digits", limit=50).fingerprint() == original
    changed = data.load("digits", limit=50)
    getattr(changed, part).view(-1)[17] += 1
    assert changed.fingerprint() != original


def test_generators_of_different_purposes_draw_differently():
    draws = {
        tuple(torch.randperm(20, generator=data.seeded_generator(*key)).tolist())
        for key in [(0, "order", 0), (0, "order", 1), (1, "order", 0), (0, "label noise"), (10, "order", 0)]
    }
    assert len(draws) == 5
    again = torch.randperm(20, generator=data.seeded_generator(0, "order", 1)).tolist()
    assert tuple(again) in draws
