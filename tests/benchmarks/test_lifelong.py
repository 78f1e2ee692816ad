"""Lifelong learning: its tasks and files, what is tuned, a killed run that goes on, and how it judges."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread

from benchmarks.data import Dataset
from benchmarks.files import UserError
from benchmarks.lifelong import __main__ as job
from benchmarks.lifelong import experiment, report, streams
from benchmarks.lifelong.experiment import QUICK, ROWS, SETTINGS, Run
from benchmarks.lifelong.learning import Learning, MultiHead, perform
from benchmarks.lifelong.report import FAILS, HOLDS, OPEN, Claim, Finding, Row
from benchmarks.lifelong.streams import STREAMS, Sizes
from benchmarks.store import SETTINGS as BEGUN
from lookbehind_fused.lifelong import of_task

# What one process has run serves all tests of this file.
pytestmark = pytest.mark.xdist_group("lifelong")

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def results_of(folder: Path) -> dict[str, dict]:
    """Every result in the folder, without the time that it took."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*-*.json")}
    for result in found.values():
        assert result.pop("seconds") > 0
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick job, its report in the same folder."""
    folder = tmp_path_factory.mktemp("whole") / "lifelong"
    assert job.main(["--quick", "--output", str(folder)]) == 0
    return folder


# A whole job


def test_the_report_has_everything(whole: Path) -> None:
    text = (whole / "report.md").read_text()
    found = json.loads((whole / "lifelong.json").read_text())
    assert [row["label"] for row in found["rows"]] == [experiment.label(*row) for row in ROWS]
    assert all(f"| {row['label']} |" in text for row in found["rows"])
    assert all(claim["claim"] in text for claim in found["claims"])
    assert found["seeds"] == [0, 1]
    assert len({row["examples"] for row in found["rows"]}) > 4
    assert found["settings"]["stream"] == "digits"
    sizes = Sizes(40, 20, 20)
    of_seed = streams.fingerprint(streams.make("digits", None, sizes, 1, 3, False))
    assert found["environment"]["data"]["1"] == of_seed
    assert found["environment"]["commit"]
    assert found["environment"]["torch"] in text
    assert "was not at hand" in text
    assert imread(whole / "lifelong.png").shape[0] > 500
    for row in found["rows"]:
        for accuracy, forgotten, table in zip(row["accuracy"], row["forgetting"], row["tables"], strict=True):
            assert [len(line) for line in table] == [1, 2, 3]
            assert accuracy == pytest.approx(sum(table[2]) / 3)
            lost = [max(table[0][0], table[1][0]) - table[2][0], table[1][1] - table[2][1]]
            assert forgotten == pytest.approx(sum(lost) / 2)


def test_a_finished_job_is_not_repeated_and_seeds_can_be_added(whole: Path, tmp_path: Path, capfd) -> None:
    before = {name: content for name, content in contents(whole).items() if "-" in name}
    results = tmp_path / "results"
    assert job.main(["--quick", "--seeds", "1", "--output", str(whole), "--results", str(results)]) == 0
    output = capfd.readouterr()
    assert "every run has its result" in output.err
    assert "needs two seeds" in output.out
    assert {name: content for name, content in contents(whole).items() if "-" in name} == before
    assert sorted(path.name for path in results.iterdir()) == ["lifelong.json", "lifelong.png", "report.md"]


ENDING_ITSELF = """
import os, sys
from benchmarks.lifelong import __main__ as job

after, signal, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
perform, epochs = job.perform, 0

def ending(learning, path, every, advance):
    def counted():
        global epochs
        epochs += 1
        if epochs == after:
            os.kill(os.getpid(), signal)
        advance()
    return perform(learning, path, every, counted)

job.perform = ending
sys.exit(job.main(["--quick", "--checkpoint-every", "0", "--output", folder]))
"""


@pytest.mark.slow
def test_a_job_that_is_killed_and_interrupted_goes_on_to_the_same_results(tmp_path: Path, whole: Path) -> None:
    """Killed twice while it tunes and interrupted in a final run, each time after an epoch that is not yet saved."""
    folder = tmp_path / "lifelong"
    there: dict[str, bytes] = {}
    # 24 tuning runs of 4 epochs, then final ones of 6: the seventh, the twenty-second and the thirtieth run are cut.
    for after, sent, finished in ((26, signal.SIGKILL, 6), (61, signal.SIGKILL, 21), (44, signal.SIGINT, 29)):
        process = subprocess.run(
            [sys.executable, "-c", ENDING_ITSELF, str(after), str(int(sent)), str(folder)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert process.returncode == (130 if sent == signal.SIGINT else -sent), process.stderr
        assert ("interrupted; the same command goes on" in process.stderr) == (sent == signal.SIGINT)
        assert not (folder / "report.md").exists()
        assert (folder / job.CHECKPOINT).exists()
        before, there = there, {name: content for name, content in contents(folder).items() if "-" in name}
        assert len(there) == finished
        assert there.items() >= before.items(), "a finished run is not repeated"
    assert job.main(["--quick", "--output", str(folder)]) == 0
    assert results_of(folder) == results_of(whole)
    assert contents(folder).items() >= there.items()
    assert not (folder / job.CHECKPOINT).exists()


# A run


def digits(seed: int = 0, validate: bool = False) -> list[Dataset]:
    return streams.make("digits", None, QUICK.sizes, seed, 3, validate)


OPTIONS = {
    "sgd": {},
    "sam": {"rho": 0.1},
    "multistep": {"rho": 0.1, "k": 2},
    "lookbehind": {"rho": 0.1, "k": 3, "alpha": 0.5},
    "lookahead": {"k": 3, "alpha": 0.5},
}


def run_of(way: str, method: str) -> Run:
    inner = {"inner_lr": 0.05} if way == "cmaml" else {}
    return Run("final", way, method, 1, lr=0.1, **OPTIONS[method], **inner)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("way", "method"), ROWS)
def test_a_run_killed_in_mid_task_goes_on_bit_by_bit(tmp_path: Path, way: str, method: str) -> None:
    """Killed within the second epoch of the second task, whose first one is in the checkpoint."""
    run, tasks = run_of(way, method), digits()
    undisturbed = Learning(QUICK, run, tasks)
    expected = perform(undisturbed, tmp_path / "none.pt", math.inf, lambda: None)
    assert not (tmp_path / "none.pt").exists()

    killed = Learning(QUICK, run, tasks)
    steps, step = 0, killed.step

    def counted(*args: object, **more: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 3 * 4 + 3:
            raise Killed
        step(*args, **more)

    killed.step = counted
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        perform(killed, path, 0, lambda: None)
    assert torch.load(path, weights_only=True)["epochs"] == 3

    torch.manual_seed(99)  # a new process has other random numbers
    resumed = Learning(QUICK, run, tasks)
    again = perform(resumed, path, 0, lambda: None)
    assert again | {"seconds": 0} == expected | {"seconds": 0}
    for (name, p), e in zip(resumed.model.named_parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(p, e), name
    assert len(resumed.memory) == (0 if way == "plain" else QUICK.memory)
    assert torch.equal(resumed.memory.generator.get_state(), undisturbed.memory.generator.get_state())


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    other = Learning(QUICK, run_of("replay", "sam"), digits())
    other.epoch()
    torch.save(other.state(), path)
    alone = perform(Learning(QUICK, run_of("plain", "sgd"), digits()), tmp_path / "none.pt", math.inf, lambda: None)
    beside = perform(Learning(QUICK, run_of("plain", "sgd"), digits()), path, math.inf, lambda: None)
    assert alone | {"seconds": 0} == beside | {"seconds": 0}


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 and no more"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="checkpoint.pt: not a checkpoint, or a damaged one"):
        perform(Learning(QUICK, run_of("plain", "sgd"), digits()), path, 0, lambda: None)


@pytest.mark.parametrize(("way", "method"), ROWS)
def test_examples_are_those_that_the_passes_have(way: str, method: str) -> None:
    """Counted in the network, and by hand: 3 tasks, 2 epochs, 4 minibatches of 10, a memory that is empty once."""
    run = run_of(way, method)
    learnt = Learning(QUICK, run, digits())
    while not learnt.finished:
        learnt.epoch()
    gradients = {"sgd": 1, "lookahead": 1, "sam": 2, "multistep": 3, "lookbehind": 4}[method]
    of_step = {"plain": [10] * 24, "replay": [10] + [20] * 23, "cmaml": [20] + [30] * 23}[way]
    assert learnt.model.examples == gradients * sum(of_step)
    passes = gradients * 24 * (11 if way == "cmaml" else 1)
    assert experiment.passes(QUICK, run) == passes


def test_replay_is_a_step_on_minibatch_and_memory() -> None:
    """Two steps of SGD with replay, beside the same by hand."""
    learnt = Learning(QUICK, run_of("replay", "sgd"), digits())
    by_hand = Learning(QUICK, run_of("replay", "sgd"), digits())
    task = digits()[0]
    for start in (0, 10):
        images, labels = task.train_images[start : start + 10], task.train_labels[start : start + 10]
        both = of_task(images, labels, 0)
        if start:
            held = by_hand.memory.sample(10)
            both = type(both)(*(torch.cat(pair) for pair in zip(held, both, strict=True)))
        loss = F.cross_entropy(by_hand.model(both.inputs, both.tasks), both.targets)
        gradients = torch.autograd.grad(loss, list(by_hand.model.parameters()))
        with torch.no_grad():
            for p, g in zip(by_hand.model.parameters(), gradients, strict=True):
                p -= 0.1 * g
        by_hand.memory.push(of_task(images, labels, 0))
        learnt.step(images, labels, 0, first=True)
    for p, e in zip(learnt.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(p, e, rtol=1e-5, atol=1e-6)  # sums in another order


def test_only_the_head_of_a_task_answers_for_it() -> None:
    for shape in ((1, 8, 8), (3, 32, 32)):
        model = MultiHead(shape, tasks=4, classes=5, width=4)
        images = torch.randn(6, *shape)
        tasks = torch.tensor([0, 1, 2, 3, 3, 0])
        logits = model(images, tasks)
        assert logits.shape == (6, 5)
        rows = model.head.weight.view(4, 5, -1), model.head.bias.view(4, 5)
        for i, task in enumerate(tasks):
            torch.testing.assert_close(logits[i], rows[0][task] @ model.trunk(images)[i] + rows[1][task])
        logits[tasks == 1].sum().backward()
        reached = model.head.weight.grad.view(4, 5, -1).abs().sum((1, 2)) > 0
        assert reached.tolist() == [False, True, False, False]


# Tuning


def test_every_row_has_as_many_trials_and_every_learning_rate() -> None:
    for name in ("rotations", "pairs"):
        settings = SETTINGS[name]
        for way, method in ROWS:
            trials = experiment.candidates(settings, way, method)
            assert len(trials) == settings.trials == 12
            assert sorted(own["lr"] for own in trials) == sorted(settings.lrs)
            if "rho" in trials[0]:
                assert {rho: sum(own["rho"] == rho for own in trials) for rho in settings.rhos} == dict.fromkeys(
                    settings.rhos, 3
                )
            assert trials == experiment.candidates(settings, way, method)
    assert {frozenset(experiment.candidates(SETTINGS["rotations"], *row)[0]) for row in ROWS} >= {
        frozenset({"lr"}), frozenset({"lr", "rho", "k", "alpha", "inner_lr"})
    }  # fmt: skip


def test_the_best_trial_is_chosen_and_final_runs_follow() -> None:
    trials = experiment.tuning(QUICK, "plain", "sgd")
    done = {run.name: {"accuracy": 0.5} for _, run in trials}
    assert experiment.answers(QUICK, done) == {("plain", "sgd"): trials[0][0]}
    done[trials[1][1].name] = {"accuracy": 0.6}
    assert experiment.answers(QUICK, done) == {("plain", "sgd"): trials[1][0]}
    plan = experiment.plan(QUICK, 3, done)
    assert len(plan) == 2 * len(ROWS) + 3
    assert [run.seed for run in plan[-3:]] == [0, 1, 2]
    assert len(experiment.plan(QUICK, 3, done, guess=True)) == (2 + 3) * len(ROWS)
    assert len({run.name for run in experiment.plan(SETTINGS["rotations"], 5, {}, guess=True)}) == (12 + 5) * len(ROWS)


def test_no_test_image_is_used_in_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NaN for every test image the tuning tasks are the same."""
    images = streams.load("digits", None)
    clean = digits(experiment.TUNING_SEED, validate=True), digits(0)
    poisoned = replace(images, test_images=torch.full_like(images.test_images, math.nan))
    monkeypatch.setattr(streams, "load", lambda *_: poisoned)
    assert streams.fingerprint(digits(experiment.TUNING_SEED, validate=True)) == streams.fingerprint(clean[0])
    assert streams.fingerprint(digits(0)) != streams.fingerprint(clean[1])


# Judging


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.019, 0.02, 0.021), HOLDS),
        ((-0.019, -0.02, -0.021), FAILS),
        ((0.01, 0.02, 0.03), OPEN),
        ((0.01, 0.01), HOLDS),
        ((0.0, 0.0), OPEN),
        ((0.5,), OPEN),
    ],
)
def test_verdict(differences: tuple[float, ...], verdict: str) -> None:
    assert Finding("", differences).verdict == verdict


def test_a_claim_is_what_its_findings_are() -> None:
    yes, no, unknown = Finding("", (0.1, 0.1)), Finding("", (-0.1, -0.1)), Finding("", (0.1,))
    assert Claim("", (yes, yes)).verdict == HOLDS
    assert Claim("", (yes, unknown)).verdict == OPEN
    assert Claim("", (yes, unknown, no)).verdict == FAILS


def test_claims_of_made_up_rows() -> None:
    """Lookbehind learns better everywhere, and forgets less with replay alone."""
    made_up = []
    for way, method in ROWS:
        ours = method == "lookbehind"
        accuracy = tuple((0.8 if ours else 0.7) + shift for shift in (0.0, 0.001, 0.002))
        lost = tuple((0.1 if ours == (way == "replay") else 0.2) + shift for shift in (0.0, 0.001, 0.002))
        table = ((0.9,), (0.5, 0.7))
        made_up.append(Row(way, method, experiment.label(way, method), {}, accuracy, lost, (table,) * 3, 1, 1.0))
    claims = report.judge(made_up)
    assert [claim.verdict for claim in claims] == [HOLDS, FAILS, HOLDS, HOLDS, HOLDS, FAILS]
    assert claims[0].findings[0].differences == pytest.approx((0.1,) * 3)
    assert claims[3].findings[0].differences == pytest.approx((0.1,) * 3)
    assert made_up[0].learnt == pytest.approx((0.8,) * 3)
    assert all(course == pytest.approx((0.9, 0.6)) for course in made_up[0].course)


# Mistakes


def refused(capfd: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs with a mistake in it: exit code 2, nothing on stdout; returns the one line on stderr."""
    capfd.readouterr()
    try:
        code = job.main(list(argv))
    except SystemExit as error:  # how argparse ends
        code = error.code
    output = capfd.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.startswith("benchmarks.lifelong: ")
    assert output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "0"], "--seeds: expected a whole number of at least 1, got '0'"),
        (["--stream", "nothing"], "--stream"),
        (["--stream", "cifar100"], "--stream cifar100 needs --data-dir"),
        (["--stream", "tiny-imagenet", "--data-dir", "nowhere"], "wnids.txt: No such file"),
        (["--stream", "pairs", "--data-dir", "nowhere"], "train-images-idx3-ubyte"),
        (["--nonsense"], "--nonsense"),
        (["--quick", "--training", "5000"], "training and validation images"),
        (["--quick", "--output", "/dev/null"], "--output /dev/null: not a folder"),
        (["--quick", "--results", "/dev/null"], "--results /dev/null: not a folder"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capfd, argv, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capfd, *argv)
    assert list(tmp_path.iterdir()) == []


DAMAGES = {
    "other data": (lambda f: change(f / BEGUN, data="0" * 64), "other data"),
    "other settings": (lambda f: change_settings(f, memory=7), "begun with memory 7, not 20"),
    "another version's settings": (lambda f: change(f / BEGUN, settings={"memory": 2}), "another version"),
    "no settings": (lambda f: (f / BEGUN).unlink(), "but no settings.json"),
    "half a result": (lambda f: result_in(f).write_text('{"run'), "not a file of this program"),
    "another run's result": (lambda f: result_in(f).rename(f / "tune-plain-sgd-lr7-seed1.json"), "not the result"),
    "a result without accuracy": (lambda f: change(result_in(f), accuracy=None), "not the result of this run"),
}


def result_in(folder: Path) -> Path:
    return next(folder.glob("tune-*.json"))


def change_settings(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / BEGUN).read_text())["settings"]
    change(folder / BEGUN, settings=settings | changes)


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, whole: Path, capfd, damage, message: str) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    for path in (whole / BEGUN, min(whole.glob("tune-*.json"))):
        (begun / path.name).write_bytes(path.read_bytes())
    damage(begun)
    before = contents(begun)
    said = refused(capfd, "--quick", "--output", str(begun))
    assert message in said
    assert str(begun) in said
    assert contents(begun) == before


def test_an_optimizer_that_refuses_its_settings_is_one_line() -> None:
    with pytest.raises(UserError, match=r"final-plain-sam-rho-1-lr0.1-seed0: rho: expected a finite number >= 0"):
        Learning(QUICK, Run("final", "plain", "sam", 0, lr=0.1, rho=-1.0), digits())


def test_every_stream_has_its_settings_and_a_label() -> None:
    assert len({stream.label for stream in STREAMS.values()}) == len(STREAMS)
    assert set(SETTINGS) == set(STREAMS) - {"digits"}
