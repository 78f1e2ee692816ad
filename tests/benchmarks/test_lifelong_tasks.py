"""The tasks of lifelong learning and the files that they come from, written here: what is read, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.files import UserError
from benchmarks.lifelong import files, streams
from benchmarks.lifelong.experiment import SETTINGS, Run
from benchmarks.lifelong.learning import Learning
from benchmarks.lifelong.streams import STREAMS, Sizes
from tests.benchmarks.test_data import write_idx


@pytest.fixture
def fashion(tmp_path: Path) -> str:
    write_idx(tmp_path, train=2000, test=800)
    return str(tmp_path)


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize("name", ["rotations", "permutations", "pairs"])
def test_tasks_of_fashion_mnist(monkeypatch: pytest.MonkeyPatch, fashion: str, name: str) -> None:
    """No image is in two tasks or in two parts of one; labels are those of the images, and begin at 0."""
    plain = replace(STREAMS[name], transform=STREAMS[name].transform and "none")
    sizes = Sizes(40, 30, 20)
    tasks = streams.make(name, fashion, sizes, 3, 20, False)
    assert len(tasks) == STREAMS[name].tasks == (5 if name == "pairs" else 20)
    images = streams.load("fashion-mnist", fashion)
    monkeypatch.setitem(streams.STREAMS, name, plain)
    seen: set[bytes] = set()
    where = {image.numpy().tobytes(): int(label) for image, label in zip(images.train_images, images.train_labels)}  # noqa: B905
    for task, validation in zip(
        streams.make(name, fashion, sizes, 3, 20, False), streams.make(name, fashion, sizes, 3, 20, True), strict=True
    ):
        assert task.train_images.shape == (40, 1, 14, 14)
        assert torch.equal(task.train_images, validation.train_images)
        own = rows(task.train_images) | rows(validation.test_images)
        assert len(own) == 70
        assert not own & seen
        assert own <= set(where)
        seen |= own
        assert rows(task.test_images) <= rows(images.test_images)
    for number, (task, untransformed) in enumerate(
        zip(tasks, streams.make(name, fashion, sizes, 3, 20, False), strict=True)
    ):
        first = 2 * number if name == "pairs" else 0
        expected = [where[image.numpy().tobytes()] - first for image in untransformed.train_images]
        assert task.train_labels.tolist() == expected
        assert set(expected) <= set(range(STREAMS[name].classes))
        if name == "permutations":
            a, b = task.train_images.flatten(1), untransformed.train_images.flatten(1)
            assert torch.equal(a.sort(1).values, b.sort(1).values)
            assert not torch.equal(a, b)
    assert streams.fingerprint(tasks) != streams.fingerprint(streams.make(name, fashion, sizes, 4, 20, False))


def test_a_quarter_turn() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    torch.testing.assert_close(streams.rotated(image, 90), image.rot90(1, (2, 3)), rtol=0, atol=1e-4)
    torch.testing.assert_close(streams.rotated(image, 0), image, rtol=0, atol=1e-4)
    assert streams.rotated(image, 45).isfinite().all()


def test_more_images_than_there_are(fashion: str) -> None:
    with pytest.raises(UserError, match="task 0 has 100 training and validation images, 101 are asked for"):
        streams.make("rotations", fashion, Sizes(60, 41, 10), 0, 20, False)
    with pytest.raises(UserError, match="task 0 has 40 test images, 41 are asked for"):
        streams.make("rotations", fashion, Sizes(60, 40, 41), 0, 20, False)


# Files


def write_cifar100(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """train.bin with 4 images of each fine class and test.bin with 2, as they are published."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(3)
    written = {}
    for name, each in (("train.bin", 4), ("test.bin", 2)):
        fine = numbers.permutation(np.repeat(np.arange(100, dtype=np.uint8), each))
        images = numbers.integers(0, 256, (len(fine), 3, 32, 32), np.uint8)
        records = (bytes([label // 5, label]) + image.tobytes() for label, image in zip(fine, images, strict=True))
        (folder / name).write_bytes(b"".join(records))
        written[name] = fine, images
    return written


@pytest.mark.parametrize("inside", ["", "cifar-100-binary"])
def test_split_cifar100(tmp_path: Path, inside: str) -> None:
    written = write_cifar100(tmp_path / inside)
    fine, images = written["train.bin"]
    tasks = streams.make("cifar100", str(tmp_path), Sizes(15, 5, 10), 0, 20, False)
    assert len(tasks) == 20
    x = images.astype(np.float64)
    x = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    for number, task in enumerate(tasks):
        assert task.train_images.shape == (15, 3, 32, 32)
        assert set(task.test_labels.tolist()) == set(range(5))
        for image, label in zip(task.train_images, task.train_labels, strict=True):
            of_class = torch.from_numpy(x[fine == 5 * number + int(label)]).float()
            assert (of_class - image).abs().amax((1, 2, 3)).min() < 1e-5
    settings = replace(SETTINGS["cifar100"], training=15, validation=5, test=10, epochs=1, width=2, memory=20)
    run = Run("final", "cmaml", "lookbehind", 1, lr=0.1, rho=0.1, k=2, alpha=0.5, inner_lr=0.05)
    learnt = Learning(settings, run, tasks[:2])
    while not learnt.finished:
        learnt.epoch()
    assert all(p.isfinite().all() for p in learnt.model.parameters())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "test.bin").unlink(), "test.bin: No such file"),
        (lambda f: (f / "train.bin").write_bytes(b""), "train.bin: 0 bytes, expected a multiple of 3074"),
        (lambda f: (f / "train.bin").write_bytes(bytes(3075)), "train.bin: 3075 bytes, expected a multiple"),
        (lambda f: (f / "train.bin").write_bytes(b"\0\x64" + bytes(3072)), "fine label 100 at index 0, expected 0..99"),
        (
            lambda f: (f / "train.bin").write_bytes(b"\x14\0" + bytes(3072)),
            "coarse label 20 at index 0, expected 0..19",
        ),
    ],
)
def test_damaged_cifar100(tmp_path: Path, damage, message: str) -> None:
    write_cifar100(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        files.cifar100(tmp_path)


def write_tiny_imagenet(folder: Path, classes: int = 200, train: int = 2) -> list[str]:
    """As its archive unpacks: `train` images of a class and one in val, some of them grey. Returns the classes."""
    names = [f"n{(i * 7919) % 100_000_000:08}" for i in range(classes)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wnids.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for label, name in enumerate(names):
        (folder / "train" / name / "images").mkdir(parents=True)
        for i in range(train + 1):
            image = Image.new("L", (64, 64), label) if i == 1 else Image.new("RGB", (64, 64), (label, 7, 200))
            if i == train:
                image.save(folder / "val" / "images" / f"val_{label}.JPEG", quality=95)
                lines.append(f"val_{label}.JPEG\t{name}\t0\t0\t32\t44\n")
            else:
                image.save(folder / "train" / name / "images" / f"{name}_{i}.JPEG", quality=95)
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    return names


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_imagenet(folder / "tiny-imagenet-200")
    return folder


def test_split_tiny_imagenet(tiny: Path) -> None:
    train, test = files.tiny_imagenet(tiny)
    assert train.images.shape == (400, 3, 64, 64)
    assert test.images.shape == (200, 3, 64, 64)
    assert train.labels.tolist() == [label for label in range(200) for _ in range(2)]
    assert test.labels.tolist() == list(range(200))
    for label in (0, 80, 199):  # what JPEG leaves of a colour
        assert np.abs(test.images[label].astype(int) - np.array([label, 7, 200])[:, None, None]).max() <= 3
        assert np.abs(train.images[2 * label + 1].astype(int) - label).max() <= 3
    assert len(files.tiny_imagenet(tiny, most=1)[0].labels) == 200
    tasks = streams.make("tiny-imagenet", str(tiny), Sizes(15, 5, 10), 0, 20, False)
    assert len(tasks) == 20
    assert all(sorted(task.test_labels.tolist()) == list(range(10)) for task in tasks)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "wnids.txt").unlink(), "wnids.txt: No such file"),
        (lambda f: (f / "wnids.txt").write_text("\n"), "wnids.txt: empty"),
        (lambda f: (f / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn5\n"), "line 1 has class 'n5'"),
        (lambda f: next((f / "train").rglob("*_0.JPEG")).write_bytes(b"no image"), "_0.JPEG: cannot identify"),
        (lambda f: Image.new("RGB", (9, 8)).save(f / "val/images/val_0.JPEG"), "9x8 pixels, expected 64x64"),
        (lambda f: [path.unlink() for path in (f / "train" / "n00000000" / "images").iterdir()], "no JPEG images"),
    ],
)
def test_damaged_tiny_imagenet(tmp_path: Path, damage, message: str) -> None:
    write_tiny_imagenet(tmp_path, classes=3, train=1)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        files.tiny_imagenet(tmp_path)
