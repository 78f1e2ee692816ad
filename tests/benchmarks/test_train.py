"""The main job: what it computes and writes, how it survives kills, and what it says to mistakes."""

import csv
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import checkpoint as checkpoints
from benchmarks import files, methods, options
from benchmarks.job import Job
from benchmarks.methods import METHODS
from benchmarks.models import ResidualNetwork
from benchmarks.train import __main__ as train
from benchmarks.train import plots, rounding
from tests.benchmarks.test_data import write_cifar10, write_idx

# What one process has trained serves all tests of this file.
pytestmark = pytest.mark.xdist_group("train")

# 6 steps an epoch, 12 a method, well under a second
SMALL = ["--limit", "100", "--batch-size", "16", "--epochs", "2", "--width", "4"]
STEPS = 12


def flags(**settings: object) -> list[str]:
    """`k=5` as `--k 5`."""
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def run(folder: Path, *more: str, method: str = "lookbehind", code: int = 0) -> dict[str, Tensor]:
    """A small run into `folder`; returns the weights of the method."""
    assert train.main([*SMALL, "--method", method, "--output", str(folder), *more]) == code
    return torch.load(folder / f"weights-{method}.pt") if code == 0 else {}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(capfd: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs with a mistake in it: exit code 2, nothing on stdout; returns the one line on stderr."""
    capfd.readouterr()
    try:
        code = train.main(list(argv))
    except SystemExit as error:  # how argparse ends
        code = error.code
    output = capfd.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.startswith("benchmarks.train: ")
    assert output.err.count("\n") == 1
    return output.err


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a small run."""
    monkeypatch.setattr(plots, "draw", lambda path, checkpoint: None)


# The network


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_network_takes_images_of_any_size(channels, size, depth):
    network = ResidualNetwork(channels, 10, width=4, depth=depth)
    shapes = {}
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: shapes.update({module: tuple(output.shape)}))
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 10)
    ends = [shapes[network.blocks[depth * (stage + 1) - 1]] for stage in range(3)]
    assert ends == [(2, 4, size, size), (2, 8, size // 2, size // 2), (2, 16, size // 4, size // 4)]


def test_the_network_is_residual():
    """With the last BatchNorm's weight and bias at zero a block passes its input on."""
    network = ResidualNetwork(1, 10, width=4)
    block = network.blocks[0]
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(x), x)


# A whole run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One run of the four default methods at the default size, with its output."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    argv = ["-m", "benchmarks.train", "--epochs", "3", "--k", "3", "--alpha", "0.4", "--output", str(folder)]
    result = subprocess.run([sys.executable, *argv], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with open(folder / "history.csv") as file:
        history = list(csv.DictReader(file))
    with open(folder / "summary.csv") as file:
        summary = {row["method"]: row for row in csv.DictReader(file)}
    return {
        "folder": folder,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "history": history,
        "summary": summary,
        "json": json.loads((folder / "results.json").read_text()),
    }


def test_every_method_learns(whole):
    for method, row in whole["summary"].items():
        assert float(row["test_accuracy"]) > 0.95, method
        first = next(float(line["loss"]) for line in whole["history"] if line["method"] == method)
        assert abs(first - math.log(10)) < 0.7, "an untrained network guesses"
        assert float(row["final_loss"]) < 0.2


def test_table_csv_and_json_agree(whole):
    assert list(whole["summary"]) == list(methods.DEFAULT)
    table = [re.split(r"\s{2,}", line) for line in whole["stdout"].splitlines()]
    assert table[0] == [
        "method",
        "test accuracy",
        "final loss",
        "gradient evaluations",
        "seconds",
        "seconds/evaluation",
        "sharpness",
        "accuracy, noise",
    ]
    for line, row, entry in zip(table[2:], whole["summary"].values(), whole["json"]["summary"], strict=True):
        assert line[0] == row["method"] == entry["method"]
        assert line[1] == f"{float(row['test_accuracy']):.2%}" == f"{entry['test_accuracy']:.2%}"
        assert line[2] == f"{float(row['final_loss']):.4g}" == f"{entry['final_loss']:.4g}"
        assert line[3].replace(",", "") == row["gradient_evaluations"] == str(entry["gradient_evaluations"])
        assert line[4] == f"{float(row['seconds']):.1f}" == f"{entry['seconds']:.1f}"
        assert line[5] == f"{float(row['seconds_per_evaluation']):.5f}" == f"{entry['seconds_per_evaluation']:.5f}"
        assert entry["seconds"] / entry["gradient_evaluations"] == entry["seconds_per_evaluation"] > 0
        assert line[6] == f"{float(row['sharpness']):.4g}" == f"{entry['sharpness']:.4g}"
        assert line[7] == f"{float(row['noise_accuracy']):.2%}" == f"{entry['noise_accuracy']:.2%}"
    assert whole["json"]["settings"]["k"] == 3
    assert whole["json"]["environment"]["torch"] == str(torch.__version__)


def test_gradient_evaluations(whole):
    """3 epochs of 1343 // 64 = 20 steps: one for SGD, two for SAM, k + 1 = 4 for Lookbehind."""
    counted = {method: int(row["gradient_evaluations"]) for method, row in whole["summary"].items()}
    assert counted == {"sgd": 60, "sam": 120, "lookbehind": 240, "lookbehind-adaptive": 240}


def test_history_has_a_line_for_each_step(whole):
    for method in methods.DEFAULT:
        lines = [line for line in whole["history"] if line["method"] == method]
        assert [int(line["step"]) for line in lines] == list(range(1, 61))
        assert [int(line["epoch"]) for line in lines] == [epoch for epoch in (1, 2, 3) for _ in range(20)]
        evaluated = [int(line["step"]) for line in lines if line["test_accuracy"]]
        assert evaluated == [20, 40, 60]
        last = [float(line["loss"]) for line in lines[40:]]
        assert math.isclose(float(whole["summary"][method]["final_loss"]), sum(last) / 20, rel_tol=1e-12)
        assert whole["summary"][method]["test_accuracy"] == lines[-1]["test_accuracy"]
        alphas = [line["alpha"] for line in lines]
        if method == "lookbehind-adaptive":
            assert all(0 < float(alpha) <= 1 for alpha in alphas)
            assert len(set(alphas)) > 40
        else:
            expected = {"sgd": "", "sam": 1.0, "lookbehind": pytest.approx(0.4)}[method]
            assert all((float(alpha) if alpha else "") == expected for alpha in alphas)


def test_the_first_loss_is_the_same_for_all(whole):
    """Same weights, same batch, and evaluation 0 is unperturbed; after one step the methods part."""
    at = {step: [line["loss"] for line in whole["history"] if line["step"] == str(step)] for step in (1, 2)}
    assert len(set(at[1])) == 1
    assert len(set(at[2])) == 4


def test_the_saved_weights_have_the_accuracy_that_was_reported(whole):
    chosen, _ = options.parse(["--threads", "1"])
    job = Job(chosen)
    for method, row in whole["summary"].items():
        job.model.load_state_dict(torch.load(whole["folder"] / f"weights-{method}.pt"))
        job.model.eval()
        right = (job.model(job.data.test_images).argmax(1) == job.data.test_labels).sum().item()
        assert right / 454 == float(row["test_accuracy"])


def test_the_saved_weights_have_the_sharpness_and_the_robustness_that_were_reported(whole):
    """Sharpness as its definition has it, over the first 512 images in minibatches of 64."""
    chosen, _ = options.parse(["--threads", "1"])
    job = Job(chosen)
    for method, row in whole["summary"].items():
        job.model.load_state_dict(torch.load(whole["folder"] / f"weights-{method}.pt"))
        job.model.eval()
        params = list(job.model.parameters())
        rises = []
        for batch in torch.arange(512).split(64):
            loss = job.loss(batch)
            grads = torch.autograd.grad(loss, params)
            norm = torch.cat([g.flatten() for g in grads]).norm()
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p += 0.05 * g / norm
                rises.append(job.loss(batch).item() - loss.item())
                for p, g in zip(params, grads, strict=True):
                    p -= 0.05 * g / norm
        # the rise is a difference of two losses in float32
        assert float(row["sharpness"]) == pytest.approx(sum(rises) / 8, rel=1e-3)
        assert 0.5 < float(row["noise_accuracy"]) < float(row["test_accuracy"]) + 0.01


# Every method

# gradient evaluations a step with k = 3
COSTS = {
    "sgd": 1,
    "lookahead": 1,
    "sam": 2,
    "multistep": 4,
    "multistep-average": 4,
    "lookahead-sam": 2,
    "lookbehind": 4,
    "lookbehind-adaptive": 4,
    "lookbehind-within": 4,
    "sam-free": 1,
    "lookbehind-free": 3,
    "sam-quarter": 1.25,
    "lookbehind-quarter": 3.25,
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of every method."""
    folder = tmp_path_factory.mktemp("family") / "run"
    assert train.main([*SMALL, *flags(method=",".join(METHODS), k=3, output=folder)]) == 0
    return folder


def test_every_method_costs_what_it_says(family):
    for method, record in checkpoints.load(family).records.items():
        times_k, more = METHODS[method].gradients
        assert record.evaluations == COSTS[method] * STEPS == (3 * times_k + more) * STEPS


def test_every_method_is_another_one(family):
    weights = [torch.load(family / f"weights-{method}.pt")["stem.weight"] for method in METHODS]
    assert len(weights) == len(COSTS)
    for a, b in itertools.combinations(weights, 2):
        assert not torch.equal(a, b)


@pytest.mark.sample(4)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_as_though_it_had_not_stopped(tmp_path, family, no_picture, monkeypatch, method):
    """Stopped after 7 of 12 steps: within an epoch, and between two of Lookahead's interpolations."""
    save, folder = checkpoints.save, tmp_path / "run"

    def interrupt(folder: Path, checkpoint: checkpoints.Checkpoint) -> None:
        save(folder, checkpoint)
        if checkpoint.records[method].step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", interrupt)
        run(folder, *flags(k=3, checkpoint_every=7), method=method, code=130)
    assert checkpoints.load(folder).records[method].sharpness is None
    assert train.main(["--resume", "--output", str(folder)]) == 0
    assert same(torch.load(folder / f"weights-{method}.pt"), torch.load(family / f"weights-{method}.pt"))
    ours, expected = (vars(checkpoints.load(of).records[method]) for of in (folder, family))
    assert {**ours, "seconds": None} == {**expected, "seconds": None}


def test_lookaheads_slow_weights_are_what_is_evaluated_and_saved(tmp_path, no_picture):
    """With more steps between two interpolations than the run has, they are the first weights."""
    chosen, _ = options.parse(SMALL)
    job = Job(chosen)
    saved = run(tmp_path / "run", *flags(k=STEPS + 1), method="lookahead")
    assert all(torch.equal(saved[name], p) for name, p in job.model.named_parameters())
    assert not torch.equal(saved["norm.running_mean"], job.model.norm.running_mean)


def test_each_inner_step_of_free_lookbehind_has_a_minibatch_of_its_own(tmp_path, no_picture, monkeypatch):
    chosen, _ = options.parse([*SMALL, "--k", "3"])
    job, seen = Job(chosen), []
    loss = Job.loss
    monkeypatch.setattr(Job, "loss", lambda self, batch: (seen.append(batch.tolist()), loss(self, batch))[1])
    run(tmp_path / "run", "--k", "3", method="lookbehind-free")
    assert seen == [job.batch(number).tolist() for number in range(3 * STEPS)]


def test_microbatches_split_the_minibatch(tmp_path, no_picture, monkeypatch):
    """m-SAM with two halves: each is evaluated twice, and both ascend by themselves."""
    seen, loss = [], Job.loss
    monkeypatch.setattr(Job, "loss", lambda self, batch: (seen.append(batch.tolist()), loss(self, batch))[1])
    split = run(tmp_path / "split", "--microbatches", "2", method="sam")
    job = Job(options.parse(SMALL)[0])
    batch = job.batch(0).tolist()
    assert seen[:4] == [batch[:8], batch[:8], batch[8:], batch[8:]]
    assert checkpoints.load(tmp_path / "split").records["sam"].evaluations == 4 * STEPS
    assert not same(split, run(tmp_path / "whole", method="sam"))


def test_the_picture_shows_every_method(whole):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    picture = imread(whole["folder"] / "curves.png")[..., :3]
    assert picture.shape == (1120, 2000, 3)
    for method in methods.DEFAULT:
        colour = METHODS[method].colour
        painted = (abs(picture - to_rgb(colour)) < 0.01).all(axis=2)
        left, right = painted[:, :1100], painted[:, 1150:]
        assert left.sum() > 1000, f"{method} in the loss panel"
        assert right.sum() > 300, f"{method} in the accuracy panel"
        # the line goes from one end of the loss panel to the other
        assert left.any(axis=0).nonzero()[0].max() > 950


def test_stderr_without_a_terminal_is_a_few_lines(whole):
    lines = whole["stderr"].splitlines()
    assert len(lines) == 6  # the job, four methods, where the files are
    assert "\r" not in whole["stderr"]
    assert str(whole["folder"]) in lines[-1]


# What is computed


def test_the_same_seed_gives_the_same_bits(tmp_path, no_picture):
    first = run(tmp_path / "a", method="lookbehind-adaptive")
    torch.rand(3)
    assert same(first, run(tmp_path / "b", method="lookbehind-adaptive"))
    assert not same(first, run(tmp_path / "c", "--seed", "1", method="lookbehind-adaptive"))
    assert (tmp_path / "a/history.csv").read_bytes() == (tmp_path / "b/history.csv").read_bytes()


def test_a_method_does_not_depend_on_those_before_it(tmp_path, no_picture):
    alone = run(tmp_path / "alone", method="lookbehind")
    assert same(alone, run(tmp_path / "after", "--method", "sam", method="lookbehind"))
    assert same(alone, run(tmp_path / "before", *flags(method="sgd,lookbehind"), method="lookbehind"))


def test_sam_without_radius_is_sgd(tmp_path, no_picture):
    """The weights are SGD's, bit for bit; BatchNorm's running averages have seen each batch twice."""
    sgd = run(tmp_path / "sgd", method="sgd")
    sam = run(tmp_path / "sam", "--rho", "0", method="sam")
    trained = [name for name in sgd if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(sgd[name], sam[name]) for name in trained)
    assert sam["norm.num_batches_tracked"] == 2 * sgd["norm.num_batches_tracked"] == 2 * STEPS


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of a run without options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda path, checkpoint: None)
        return run(tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "option",
    [
        flags(k=3),
        flags(rho=0.5),
        flags(alpha=0.9),
        ["--asam"],
        flags(lr=0.01),
        flags(momentum=0.5),
        flags(weight_decay=0.1),
        flags(schedule="constant"),
        flags(batch_size=17),
        flags(label_noise=0.3),
        flags(depth=2),
        flags(autocast="bfloat16"),
    ],
    ids=" ".join,
)
def test_every_option_changes_the_result(tmp_path, no_picture, plain, option):
    assert not same(plain, run(tmp_path / "run", *option))


def test_options_of_asam_and_adaptive_alpha_change_the_result(tmp_path, no_picture):
    assert not same(run(tmp_path / "a", "--asam"), run(tmp_path / "b", "--asam", "--eta", "1"))
    adaptive = run(tmp_path / "c", method="lookbehind-adaptive")
    assert not same(adaptive, run(tmp_path / "d", "--alpha-scope", "tensor", method="lookbehind-adaptive"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_is_around_what_trains_alone(dtype):
    """The weights, their gradients and the loss stay in float32; accuracy and sharpness are measured there."""
    job = Job(options.parse([*SMALL, "--autocast", dtype])[0])
    seen = []
    job.model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loss = job.loss(job.batch(0))
    loss.backward()
    assert loss.dtype == job.model.stem.weight.dtype == job.model.stem.weight.grad.dtype == torch.float32
    assert seen == [getattr(torch, dtype)]
    job.test_accuracy()
    job.sharpness([0.1], adaptive=False)
    assert set(seen[1:]) == {torch.float32}


def test_evaluations_are_counted_where_they_happen(tmp_path, no_picture, monkeypatch):
    """Against the network's own count of forward passes in training mode; the 2k form costs 2k."""
    passes = 0
    forward = ResidualNetwork.forward

    def counted(self: ResidualNetwork, x: Tensor) -> Tensor:
        nonlocal passes
        passes += self.training
        return forward(self, x)

    monkeypatch.setattr(ResidualNetwork, "forward", counted)
    for folder, more, expected in (("reuse", [], 4), ("2k", ["--no-reuse"], 6)):
        passes = 0
        run(tmp_path / folder, "--k", "3", *more)
        assert passes == expected * STEPS
        assert checkpoints.load(tmp_path / folder).records["lookbehind"].evaluations == passes


def test_the_learning_rate_follows_its_schedule():
    chosen, _ = options.parse([*SMALL, "--lr", "0.3"])
    job = Job(chosen)
    optimizer, scheduler = job.make_optimizer("lookbehind")
    seen = []
    for _ in range(STEPS):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step(lambda: (loss := job.loss(torch.arange(16))).backward() or loss)
        scheduler.step()
    assert seen == pytest.approx([0.15 * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_every_batch_is_new_and_full():
    chosen, _ = options.parse(SMALL)
    job = Job(chosen)
    orders = []
    for epoch in range(3):
        batches = [job.batch(6 * epoch + place) for place in range(6)]
        assert [len(batch) for batch in batches] == [16] * 6
        order = torch.cat(batches).tolist()
        assert len(set(order)) == 96
        assert set(order) <= set(range(100))
        orders.append(order)
    assert len(set(map(tuple, orders))) == 3


def test_fewer_images_than_a_batch(tmp_path, no_picture):
    assert train.main(["--limit", "5", "--epochs", "2", "--method", "sgd", "--output", str(tmp_path / "run")]) == 0
    assert checkpoints.load(tmp_path / "run").records["sgd"].step == 2


def test_compiled_training_gives_the_same_curve(tmp_path, no_picture, monkeypatch):
    """Through torch.compile's front end, with a backend that needs no C++ compiler and no half minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    eager, compiled = run(tmp_path / "eager"), run(tmp_path / "compiled", "--compile")
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_other_data_goes_through(tmp_path, no_picture, name):
    write = {"fashion-mnist": write_idx, "cifar10": write_cifar10}[name]
    write(tmp_path / "data")
    weights = run(tmp_path / "run", *flags(data=name, data_dir=tmp_path / "data", batch_size=8))
    assert weights["stem.weight"].shape[1] == {"fashion-mnist": 1, "cifar10": 3}[name]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_diverged_run_ends_and_says_so(tmp_path, capfd):
    """Down to the picture, which has only gaps to draw, and JSON, which has no NaN."""
    run(tmp_path / "run", "--lr", "1e20", method="lookbehind-adaptive")
    assert " nan " in capfd.readouterr().out
    assert json.loads((tmp_path / "run/results.json").read_text())["summary"][0]["final_loss"] is None
    assert (tmp_path / "run/curves.png").stat().st_size > 10_000


# What 16 bits leave


def test_training_with_and_without_autocast_is_compared(monkeypatch, capsys):
    """One short run of each kind: accuracies, their difference, and a line for each radius."""
    monkeypatch.setattr(rounding, "METHODS", {"sgd": (0.0,)})
    # four channels in channels_last are too few for oneDNN, which corrupts memory there (torch 2.13)
    assert rounding.main([*SMALL, "--width", "8", "--epochs", "1", "--seeds", "1"]) == 0
    accuracies, curve = capsys.readouterr().out.split("\n\n")
    plain, cast, difference = (float(cell.split("±")[0]) for cell in accuracies.splitlines()[2].split("|")[3:6])
    assert difference == pytest.approx(cast - plain, abs=0.11)  # each is rounded to a tenth
    assert 5 < plain <= 100
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in curve.splitlines()]
    assert [float(row[0]) for row in rows[2:]] == [*rounding.RADII]
    assert {len(row) for row in rows} == {2 + 3 * len(rounding.DTYPES)}
    cosines = [float(row[3]) for row in rows[2:]]
    assert cosines == sorted(cosines)
    assert cosines[0] < 0.5 < 0.9 < cosines[-1]
    with pytest.raises(SystemExit):
        rounding.main(["--data", "cifar10"])
    assert capsys.readouterr().err.startswith("benchmarks.train.rounding: --data")


# Kills. Each run is a process forked from a server that has everything imported, so that many of them are cheap.

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.benchmarks.test_train", "sklearn.datasets", "torch._dynamo"])
KILLED = -signal.SIGKILL
KILL_OPTIONS = [*SMALL, "--method", "sgd,lookbehind-adaptive", "--k", "3", "--checkpoint-every", "2"]


def _process(argv: list[str], die_at: int | None) -> None:
    """A run that kills itself at the `die_at`-th file, between the temporary file's last byte and its new name."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    count = 0
    os_replace = os.replace

    def replace(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os_replace(source, target)

    def draw(path: Path, checkpoint: object) -> None:
        with files.replacing(path) as file:
            file.write(b"picture")

    files.os.replace = replace  # type: ignore[assignment]
    plots.draw = draw
    sys.exit(train.main(argv))


def start(folder: Path, die_at: int | None = None) -> multiprocessing.Process:
    """Starts a run in `folder`, or resumes it if a checkpoint is there."""
    resume = ["--resume"] if (folder / checkpoints.NAME).exists() else KILL_OPTIONS
    process = CONTEXT.Process(target=_process, args=([*resume, "--output", str(folder)], die_at))
    process.start()
    return process


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unkilled") / "run"
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    return folder


def assert_same_run(folder: Path, expected: Path) -> None:
    """The same files; the same weights, history and count of evaluations, bit for bit."""
    assert contents(folder).keys() == contents(expected).keys()
    for name in ("history.csv", "weights-sgd.pt", "weights-lookbehind-adaptive.pt"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    for method, record in checkpoints.load(expected).records.items():
        ours = vars(checkpoints.load(folder).records[method])
        assert {**ours, "seconds": None} == {**vars(record), "seconds": None}


def test_kills_between_a_file_and_its_name_are_survived(tmp_path, unkilled):
    """One run, killed at the first to fifth file that it writes after each start, until it ends."""
    folder = tmp_path / "run"
    died_at = set()
    for die_at in itertools.islice(itertools.cycle((1, 2, 3, 4, 5)), 60):
        process = start(folder, die_at)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == KILLED
        died_at |= {path.name for path in folder.glob("*.tmp")}
    assert process.exitcode == 0
    written = ("checkpoint.pt", "weights-sgd.pt", "history.csv", "summary.csv", "results.json", "curves.png")
    assert {f"{name}.tmp" for name in written} <= died_at
    assert_same_run(folder, unkilled)


@pytest.mark.slow
def test_kills_at_random_moments_are_survived(tmp_path, unkilled):
    """At least five, in one run or, where a run is over before, in several."""
    moments = random.Random(time.time_ns())
    kills, runs = 0, 0
    while kills < 5:
        folder = tmp_path / f"run{runs}"
        kills += killed_over_and_over(folder, moments)
        assert_same_run(folder, unkilled)
        runs += 1
        assert runs < 10, f"{kills} kills in {runs} runs"


def killed_over_and_over(folder: Path, moments: random.Random) -> int:
    """One run to its end. Every other time it is killed only after a new checkpoint, so that it gets on.

    Returns how often it was killed.
    """
    checkpoint = folder / checkpoints.NAME
    for attempt in range(60):
        before = checkpoint.stat().st_ino if checkpoint.exists() else None
        process = start(folder)
        while attempt % 2 and process.is_alive() and (not checkpoint.exists() or checkpoint.stat().st_ino == before):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        if process.exitcode == 0:
            return attempt
        assert process.exitcode == KILLED
    raise AssertionError("it does not get on")


def test_an_interruption_of_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write() -> None:
        with files.replacing(path) as file:
            file.write(b"half")
            file.flush()
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert contents(tmp_path) == {"file": b"old"}


# Resuming


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted in the middle of an epoch of its second method."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    save, count = checkpoints.save, 0

    def interrupt(folder: Path, checkpoint: checkpoints.Checkpoint) -> None:
        nonlocal count
        save(folder, checkpoint)
        count += 1
        if count == 11:  # the start, 6 of SGD, and steps 2, 4, 6, 8
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", interrupt)
        assert train.main([*KILL_OPTIONS, "--output", str(folder)]) == 130
    assert checkpoints.load(folder).records["lookbehind-adaptive"].step == 8
    return folder


@pytest.fixture
def halfway(tmp_path, interrupted, no_picture) -> Path:
    """A copy of that run."""
    return shutil.copytree(interrupted, tmp_path / "halfway")


def test_resume_needs_no_option_again(tmp_path, halfway, unkilled, monkeypatch, capfd):
    before = checkpoints.load(halfway).records["lookbehind-adaptive"]
    trained = []
    original = train.run_method
    monkeypatch.setattr(train, "run_method", lambda method, *rest: (trained.append(method), original(method, *rest)))
    assert train.main(["--resume", "--output", str(halfway)]) == 0
    assert trained == ["lookbehind-adaptive"]
    after = checkpoints.load(halfway).records["lookbehind-adaptive"]
    assert after.loss[:8] == before.loss
    assert after.seconds > before.seconds > 0
    assert after.evaluations == STEPS * 4
    assert "sgd" in capfd.readouterr().out


def test_resume_of_a_finished_run_repeats_its_table(tmp_path, no_picture, capfd):
    run(tmp_path / "run")
    table = capfd.readouterr().out
    before = contents(tmp_path / "run")
    (tmp_path / "run/summary.csv").unlink()
    assert train.main(["--resume", "--output", str(tmp_path / "run")]) == 0
    assert capfd.readouterr().out == table
    assert contents(tmp_path / "run") == before


OTHER_SETTINGS = [
    (["--k", "4"], "--k 3, not --k 4"),
    (["--method", "sam"], "--method sgd,lookbehind-adaptive, not --method sam"),
    (["--seed", "1"], "--seed 0, not --seed 1"),
    (["--width", "8"], "--width 4, not --width 8"),
    (["--epochs", "3"], "--epochs 2, not --epochs 3"),
    (["--lr", "0.1"], "--lr 0.05, not --lr 0.1"),
    (["--asam"], "no --asam, not --asam"),
    (["--data", "cifar10"], "--data digits, not --data cifar10"),
    (["--limit", "99"], "--limit 100, not --limit 99"),
    (["--autocast", "bfloat16"], "no --autocast, not --autocast bfloat16"),
]


@pytest.mark.parametrize(("option", "message"), OTHER_SETTINGS, ids=[option[0] for option, _ in OTHER_SETTINGS])
def test_resume_with_other_settings_is_refused(halfway, capfd, option, message):
    before = contents(halfway)
    line = refused(capfd, "--resume", "--output", str(halfway), *option)
    assert message in line
    assert str(halfway / checkpoints.NAME) in line
    assert contents(halfway) == before


def test_resume_with_the_same_settings_spelled_out(halfway):
    assert train.main([*KILL_OPTIONS, "--lr", "0.05", "--resume", "--output", str(halfway)]) == 0


def test_resume_on_other_data_is_refused(tmp_path, no_picture, capfd):
    write_idx(tmp_path / "data")
    run(tmp_path / "run", *flags(data="fashion-mnist", data_dir=tmp_path / "data", batch_size=8))
    write_idx(tmp_path / "elsewhere")
    resume = ["--resume", "--output", str(tmp_path / "run"), "--data-dir", str(tmp_path / "elsewhere")]
    assert train.main(resume) == 0  # the same files in another place
    path = next((tmp_path / "elsewhere").glob("t10k-images*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = contents(tmp_path / "run")
    assert "other data" in refused(capfd, *resume)
    assert contents(tmp_path / "run") == before


def damaged(change) -> bytes:
    """A checkpoint file after `change` of its content."""

    def damage(path: Path) -> None:
        content = torch.load(path)
        change(content)
        torch.save(content, path)

    return damage


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "gone": lambda path: path.unlink(),
    "another program's": lambda path: torch.save({"epoch": 3, "model": {}}, path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "another format": damaged(lambda content: content.update(format=0)),
    "no settings": damaged(lambda content: content.pop("settings")),
    "other records": damaged(lambda content: content["records"]["sgd"].pop("step")),
    "a missing method": damaged(lambda content: content["records"].pop("sgd")),
    "no method under way": damaged(lambda content: content.update(current=None)),
    "another method under way": damaged(lambda content: content["current"].update(method="sgd")),
    "another model": damaged(lambda content: content["current"]["model"].pop("stem.weight")),
    "another shape": damaged(
        lambda content: content["current"]["model"].update({"stem.weight": torch.zeros(8, 1, 3, 3)})
    ),
    "another optimizer": damaged(lambda content: content["current"]["optimizer"]["param_groups"][0]["params"].pop()),
    "another base": damaged(lambda content: content["current"]["optimizer"]["param_groups"][0].pop("momentum")),
    "no random state": damaged(lambda content: content["current"].pop("random")),
    "another version's settings": damaged(lambda content: content["settings"].update(gamma=1)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_does_not_fit_is_refused(halfway, capfd, damage):
    damage(halfway / checkpoints.NAME)
    before = contents(halfway)
    assert str(halfway / checkpoints.NAME) in refused(capfd, "--resume", "--output", str(halfway))
    assert contents(halfway) == before


def test_a_checkpoint_cannot_run_code(halfway, capfd, tmp_path):
    class Payload:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"format": 1, "settings": Payload()}, halfway / checkpoints.NAME)
    refused(capfd, "--resume", "--output", str(halfway))
    assert not (tmp_path / "executed").exists()


def test_a_change_of_versions_is_noted(halfway, capfd):
    damaged(lambda content: content["environment"].update(torch="1.0"))(halfway / checkpoints.NAME)
    assert train.main(["--resume", "--output", str(halfway)]) == 0
    assert "note: torch was 1.0 and is" in capfd.readouterr().err


def test_resume_keeps_the_number_of_threads(halfway, capfd):
    """It decides about last bits, so a resumed run takes it from the checkpoint unless it is given."""
    damaged(lambda content: content["environment"].update(threads=2))(halfway / checkpoints.NAME)
    assert train.main(["--resume", "--output", str(halfway)]) == 0
    assert torch.get_num_threads() == 2
    assert train.main(["--resume", "--threads", "1", "--output", str(halfway)]) == 0
    assert "note: threads was 2 and is 1" in capfd.readouterr().err


# Folders


def test_a_second_run_gets_a_new_folder(tmp_path, no_picture, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    argv = [*SMALL, "--method", "sgd"]
    assert train.main(argv) == train.main([*argv, "--seed", "7"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits-001", "digits-002"]
    capfd.readouterr()
    first = contents(tmp_path / "runs/digits-001")
    assert train.main(["--resume"]) == 0  # the newest
    assert "runs/digits-002" in capfd.readouterr().err
    assert train.main(["--resume", "--seed", "7"]) == 0
    assert contents(tmp_path / "runs/digits-001") == first


def test_a_run_is_never_overwritten(tmp_path, no_picture, capfd, halfway):
    before = contents(halfway)
    line = refused(capfd, *SMALL, "--output", str(halfway))
    assert "--resume" in line
    assert str(halfway) in line
    assert contents(halfway) == before


@pytest.mark.parametrize("name", ["weights-sgd.pt", "history.csv", "curves.png"])
def test_a_single_result_is_never_overwritten(tmp_path, no_picture, capfd, name):
    (tmp_path / name).write_text("mine")
    assert str(tmp_path) in refused(capfd, *SMALL, "--output", str(tmp_path))
    assert contents(tmp_path) == {name: b"mine"}


def test_a_folder_with_other_files_is_left_alone(tmp_path, no_picture):
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_where_the_folder_should_be(tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    assert "--output" in refused(capfd, "--output", str(tmp_path / "file"))
    assert str(tmp_path / "file") in refused(capfd, *SMALL, "--output", str(tmp_path / "file/inside"))
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_to_resume(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no run in runs/" in refused(capfd, "--resume")
    assert "there is no nowhere" in refused(capfd, "--resume", "--output", "nowhere")
    assert list(tmp_path.iterdir()) == []


# Mistakes

MISTAKES = [
    (["--method", "adam"], f"--method: expected {', '.join(METHODS)}, got 'adam'"),
    (["--method", "sgd,"], "--method"),
    (["--k", "0"], "--k: expected a whole number of at least 1, got '0'"),
    (["--k", "2.5"], "--k: expected a whole number of at least 1, got '2.5'"),
    (["--k"], "--k"),
    (["--rho", "-0.1"], "--rho: expected a number of at least 0, got '-0.1'"),
    (["--rho", "nan"], "--rho: expected a number of at least 0, got 'nan'"),
    (["--rho", "inf"], "--rho"),
    (["--alpha", "0"], "--alpha: expected a number above 0 and at most 1"),
    (["--alpha", "1.01"], "--alpha"),
    (["--alpha", "adaptive"], "--method lookbehind-adaptive"),
    (["--alpha-scope", "layer"], "--alpha-scope"),
    (["--eta", "-1"], "--eta"),
    (["--epochs", "0"], "--epochs"),
    (["--batch-size", "-1"], "--batch-size"),
    (["--label-noise", "1.1"], "--label-noise: expected a fraction from 0 to 1, got '1.1'"),
    (["--seed", "-1"], "--seed"),
    (["--seed", str(2**63)], "--seed"),
    (["--lr", "0"], "--lr"),
    (["--data", "mnist"], "--data"),
    (["--data", "cifar10"], "--data-dir"),
    (["--data", "cifar10", "--data-dir", "absent"], "data_batch_1.bin"),
    (["--data", "fashion-mnist", "--data-dir", "absent"], "train-images-idx3-ubyte"),
    (["--data-dir", "absent"], "--data-dir"),
    (["--device", "gpu"], "--device gpu"),
    (["--device", "meta"], "--device meta"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--backend", "fastest"], "backend"),
    (["--backend", "fastest", "--method", "sgd"], "backend"),
    (["--microbatches", "0"], "--microbatches: expected a whole number of at least 1, got '0'"),
    (["--microbatches", "5"], "--microbatches: expected a divisor of the batch size, 64, got 5"),
    (["--threads", "0"], "--threads"),
    (["--nonsense"], "--nonsense"),
    (["--epoch", "3"], "--epoch"),
    (["extra"], "extra"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=[" ".join(argv) for argv, _ in MISTAKES])
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capfd, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capfd, *argv)
    assert list(tmp_path.iterdir()) == []


def test_damaged_data_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "data")
    path = tmp_path / "data/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    assert str(path) in refused(capfd, "--data", "fashion-mnist", "--data-dir", str(tmp_path / "data"))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_failing_compiler_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capfd):
    def compile_to_nothing(model: nn.Module) -> object:
        def forward(x: Tensor) -> Tensor:
            raise RuntimeError("no C++ compiler\nand a long story")

        return forward

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", compile_to_nothing)
    line = refused(capfd, *SMALL, "--compile")
    assert "--compile" in line
    assert "no C++ compiler" in line
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path, no_picture, monkeypatch, capfd):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", "checkpoint.pt.tmp")

    monkeypatch.setattr(files.os, "fsync", full)
    assert "No space left" in refused(capfd, *SMALL, "--output", str(tmp_path / "run"))
    assert list((tmp_path / "run").iterdir()) == []


def test_the_command_ends_with_the_code(tmp_path):
    command = [sys.executable, "-m", "benchmarks.train", "--k", "0"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as ending:
        train.main(["--help"])
    assert ending.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    chosen, _ = options.parse([])
    for name, value in vars(chosen).items():
        flag = "--" + name.replace("_", "-")
        explanation = re.search(rf"{flag} (?!\]).*?\(?default: ([^)]*)\)", text.split("what to train:")[1] + text)
        assert explanation, flag
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert explanation[1] == str(value), flag
