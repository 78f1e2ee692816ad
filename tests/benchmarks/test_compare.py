"""The comparison: what it runs, tunes and writes, how it survives kills, and how it judges."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from benchmarks.compare import __main__ as compare
from benchmarks.compare import claims as compare_claims
from benchmarks.compare import experiment as compare_runs
from benchmarks.compare import report as compare_report
from benchmarks.compare import workers
from benchmarks.compare.claims import FAILS, HOLDS, OPEN, Measured
from benchmarks.compare.experiment import FASHION_MNIST, QUICK, Row, Run

# What one process has run serves all tests of this file.
pytestmark = pytest.mark.xdist_group("compare")

SEEDS = 2
QUICK_RUN = ["--quick", "--seeds", str(SEEDS), "--jobs", "2"]
SETTINGS = replace(QUICK, seeds=SEEDS)
ROOT = Path(__file__).parents[2]
ROWS = (
    *("sgd", "sgd-longer", "lookahead", "sam", "multistep", "multistep-average", "lookahead-sam", "lookbehind"),
    *("lookbehind-adaptive", "sam-free", "lookbehind-free", "asam", "multistep-asam", "multistep-average-asam"),
    *("lookahead-asam", "lookbehind-asam", "lookbehind-adaptive-asam"),
)
PICTURES = {f"compare-{name}.png" for name in ("accuracy", "evaluations", "sharpness", "noise", "sensitivity")}


def results_of(folder: Path) -> dict[str, dict]:
    """Every result in the folder, without the time that it took."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*-*.json")}
    for result in found.values():
        assert result.pop("seconds") > 0
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(capfd: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs with a mistake in it: exit code 2, nothing on stdout; returns the one line on stderr."""
    capfd.readouterr()
    try:
        code = compare.main(list(argv))
    except SystemExit as error:  # how argparse ends
        code = error.code
    output = capfd.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.startswith("benchmarks.compare: ")
    assert output.err.count("\n") == 1
    return output.err


# A whole comparison


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick comparison, its report in the same folder."""
    folder = tmp_path_factory.mktemp("whole") / "compare"
    assert compare.main([*QUICK_RUN, "--output", str(folder)]) == 0
    return folder


def test_every_row_is_there_with_every_seed(whole):
    content = json.loads((whole / "compare.json").read_text())
    assert tuple(content["rows"]) == ROWS
    results = results_of(whole)
    for key, row in content["rows"].items():
        assert len(row["accuracy"]) == len(row["noise"]) == SEEDS
        finals = [
            result
            for result in results.values()
            if result["run"]["purpose"] == "final"
            and all(result["run"][name] == row[name] for name in ("method", "asam", "epochs", "rho", "k", "alpha"))
        ]
        finals.sort(key=lambda result: result["run"]["seed"])
        assert [result["run"]["seed"] for result in finals] == list(range(SEEDS)), key
        assert row["accuracy"] == pytest.approx([result["accuracy"] for result in finals], rel=1e-4)
        assert row["evaluations"] == finals[0]["evaluations"]
        noise = [[sum(level) / len(level) for level in result["noise"]] for result in finals]
        assert [value for seed in row["noise"] for value in seed] == pytest.approx(
            [value for seed in noise for value in seed], rel=1e-4
        )


def test_the_planned_cost_is_what_was_measured(whole):
    """Every method's gradients, and as many for the longer SGD as for Lookbehind."""
    for result in results_of(whole).values():
        assert result["evaluations"] == Run(**result["run"]).cost * (SETTINGS.training // SETTINGS.batch_size)
    rows = json.loads((whole / "compare.json").read_text())["rows"]
    assert rows["sgd-longer"]["evaluations"] == rows["lookbehind"]["evaluations"] > rows["sgd"]["evaluations"]
    assert len({row["epochs"] for key, row in rows.items() if key != "sgd-longer"}) == 1


def test_what_was_best_on_validation_images_was_chosen(whole):
    content = json.loads((whole / "compare.json").read_text())
    results = results_of(whole)

    def best(method: str, names: tuple[str, ...], **fixed: object) -> dict[str, object]:
        of_candidate: dict[tuple, list[float]] = {}
        for result in results.values():
            run = result["run"]
            if run["purpose"] == "tune" and run["method"] == method and all(run[n] == v for n, v in fixed.items()):
                of_candidate.setdefault(tuple(run[name] for name in names), []).append(result["accuracy"])
        assert len(of_candidate) > 1
        means = {candidate: sum(values) / len(values) for candidate, values in of_candidate.items()}
        top = max(means.values())
        return dict(zip(names, min(candidate for candidate, mean in means.items() if mean == top), strict=True))

    chosen = content["chosen"]
    assert chosen["lr"] == best("sgd", ("lr",))
    assert chosen["sam"] == best("sam", ("rho",), asam=False)
    assert chosen["asam"] == best("sam", ("rho",), asam=True)
    assert chosen["lookbehind"] == best("lookbehind", ("k", "alpha"), seed=0, rho=chosen["sam"]["rho"])
    assert chosen["lookahead"] == best("lookahead", ("k", "alpha"))
    for row in content["rows"].values():
        assert row["lr"] == chosen["lr"]["lr"]
        assert row["rho"] in (None, chosen["asam" if row["asam"] else "sam"]["rho"])
        if row["method"].startswith("lookbehind"):
            assert row["k"] == chosen["lookbehind"]["k"]


def test_the_markdown_says_what_the_numbers_say(whole):
    text = (whole / "compare.md").read_text()
    content = json.loads((whole / "compare.json").read_text())
    for row in content["rows"].values():
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['label']} |"))
        assert f"| {row['evaluations']:,} | {100 * sum(row['accuracy']) / SEEDS:.1f} ± " in line
    assert len(content["claims"]) == 9
    for claim in content["claims"]:
        verdict = claim["verdict"] + (" with 2 seeds" if claim["verdict"] == OPEN else "")
        assert f"{claim['text']}** | **{verdict}** |" in text
        for finding in claim["findings"]:
            assert finding["text"] in text
            assert len(finding["differences"]) == SEEDS
    assert f"torch {torch.__version__}" in text
    assert "python -m benchmarks.compare --quick --seeds 2 --jobs 2" in text


def test_the_pictures_are_drawn(whole):
    assert {path.name for path in whole.glob("*.png")} == PICTURES
    for name in PICTURES:
        picture = imread(whole / name)[..., :3]
        assert picture.shape[1] in (1800, 2000)
        assert 0.01 < (picture.min(axis=2) < 0.9).mean() < 0.5, name


def test_a_second_start_runs_nothing_and_repeats_the_table(whole, capfd, monkeypatch):
    before = contents(whole)
    monkeypatch.setattr(compare_runs, "perform", None)  # nothing may be run
    assert compare.main([*QUICK_RUN, "--output", str(whole)]) == 0
    output = capfd.readouterr()
    assert output.out.startswith("| method | rho | k | alpha | evaluations |")
    after = contents(whole)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"compare.md", "compare.json"}, "only the command in them"
    assert before.keys() == after.keys()


# Interruptions


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.compare", *QUICK_RUN, "--output", str(folder)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_results(folder: Path, process: subprocess.Popen, count: int) -> None:
    while len(list(folder.glob("*-*.json"))) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def descendants(pid: int) -> set[int]:
    try:
        children = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except FileNotFoundError:
        return set()
    return children.union(*map(descendants, children))


def wait_until_gone(pids: set[int]) -> None:
    end = time.monotonic() + 300
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.monotonic() < end, "workers outlive their parent"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_and_interrupted_comparison_goes_on_to_the_same_results(tmp_path, whole):
    """Killed during tuning, then interrupted as by Ctrl-C during the final runs; only what is missing is run again."""
    folder = tmp_path / "compare"
    process = start(folder)
    wait_for_results(folder, process, 8)
    workers = descendants(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    process.stderr.close()
    wait_until_gone(workers)
    there = {name: content for name, content in contents(folder).items() if name.endswith(".json")}
    assert len(there) < 20

    while True:
        process = start(folder)
        wait_for_results(folder, process, 30)
        workers = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        status, said = process.wait(), process.stderr.read()
        process.stderr.close()
        wait_until_gone(workers)
        if status != 0:
            break
        for path in folder.glob("*"):  # it was done before this process had its turn again: once more
            if path.name not in there and (path.suffix == ".md" or path.suffix == ".json"):
                path.unlink()
    assert status == 130
    assert said == "interrupted; the same command goes on with the runs that are missing\n"
    assert not (folder / "compare.md").exists()

    assert compare.main([*QUICK_RUN, "--jobs", "1", "--output", str(folder)]) == 0
    assert results_of(folder) == results_of(whole)
    for name, content in there.items():
        assert (folder / name).read_bytes() == content, "a finished run is not repeated"
    expected = contents(whole)
    assert all((folder / name).read_bytes() == expected[name] for name in PICTURES)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (Run("tune", "sam", 0, lr=0.1, epochs=1, rho=-1.0), compare.UserError, "rho: expected a finite number >= 0"),
        (Run("tune", "nothing", 0, lr=0.1, epochs=1), RuntimeError, "KeyError: 'nothing'"),
    ],
    ids=lambda value: getattr(value, "method", None),
)
def test_a_run_that_raises_ends_the_comparison_and_says_why(monkeypatch, run, error, message):
    monkeypatch.setattr(compare_runs, "plan", lambda settings, answers: [run])
    monkeypatch.setattr(workers, "show_progress", lambda *_, **__: None)
    with pytest.raises(error, match=message):
        compare.run_missing(QUICK, {}, 1, lambda run, result: pytest.fail("there is no result"))


# What a run is given


def test_no_test_image_is_used_in_tuning():
    """With NaN for every test image the tuning runs give the same results, bit for bit; the final ones do not."""
    images = compare_runs.load(QUICK)
    poisoned = replace(images, test_images=torch.full_like(images.test_images, math.nan))
    plan = compare_runs.plan(QUICK, compare_runs.guess(QUICK, {}))
    tuning = {run.method: run for run in plan if run.purpose == "tune"}
    assert len(tuning) == 7
    for run in tuning.values():
        clean, other = (dict(compare_runs.perform(QUICK, run, x)) for x in (images, poisoned))
        assert clean | {"seconds": 0} == other | {"seconds": 0}
    final = next(run for run in plan if run.purpose == "final")
    clean, other = (dict(compare_runs.perform(QUICK, final, x)) for x in (images, poisoned))
    assert clean["accuracy"] != other["accuracy"]


def test_validation_images_are_not_trained_on_and_have_wrong_labels_too():
    images = compare_runs.load(QUICK)
    given = {
        purpose: compare_runs.images_of(QUICK, Run(purpose, "sgd", 1, 0.1, 1), images) for purpose in ("tune", "final")
    }
    assert torch.equal(given["tune"].train_images, given["final"].train_images)
    assert torch.equal(given["tune"].train_labels, given["final"].train_labels)
    assert torch.equal(given["tune"].train_images, images.train_images[:256])
    assert torch.equal(given["tune"].test_images, images.train_images[256:384])
    assert torch.equal(given["final"].test_images, images.test_images)
    assert torch.equal(given["final"].test_labels, images.test_labels)
    wrong = [
        (given["tune"].train_labels != images.train_labels[:256]).sum(),
        (given["tune"].test_labels != images.train_labels[256:384]).sum(),
    ]
    assert sum(wrong) == round(0.2 * 384)
    assert min(wrong) > 10
    other = compare_runs.images_of(QUICK, Run("tune", "sgd", 0, 0.1, 1), images)
    assert not torch.equal(other.train_labels, given["tune"].train_labels)


def test_a_diverged_run_is_a_result():
    result = compare_runs.perform(QUICK, Run("final", "sgd", 0, lr=1e20, epochs=1))
    assert result["loss"] is None
    assert 0 <= result["accuracy"] < 0.2
    json.dumps(result, allow_nan=False)


def test_batchnorm_is_estimated_anew_before_anything_is_measured():
    """The mean over the minibatches of an epoch, as a whole pass over the data gives it to a fresh BatchNorm."""
    from benchmarks import options
    from benchmarks.job import Job

    job = Job(options.parse(["--limit", "100", "--batch-size", "20", "--width", "4"])[0])
    inputs = []
    job.model.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    job.estimate_statistics()
    assert len(inputs) == 5
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(job.model.norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    assert job.model.norm.momentum == 0.1


# What is planned


def test_the_plan_grows_with_the_answers():
    """First the learning rate; then rho; then what needs rho; last the rest."""
    first = compare_runs.plan(FASHION_MNIST, {})
    assert {run.method for run in first} == {"sgd"}
    assert len(first) == 9
    answers = {"lr": {"lr": 0.1}}
    second = compare_runs.plan(FASHION_MNIST, answers)
    assert len([run for run in second if run.method == "sam"]) == 3 * (5 + 5)
    assert {run.method for run in second} == {"sgd", "sam", "lookahead"}
    everything = compare_runs.plan(FASHION_MNIST, compare_runs.guess(FASHION_MNIST, answers))
    assert len({run.name for run in everything}) == len(everything)
    finals = [run for run in everything if run.purpose == "final"]
    assert len(finals) == 3 * len(ROWS)
    lookbehind = [run for run in everything if run.method == "lookbehind" and run.purpose == "tune"]
    assert len({(run.k, run.alpha) for run in lookbehind}) == 9
    assert len({(run.rho, run.seed) for run in lookbehind if (run.k, run.alpha) == (5, 0.5)}) == 15


def test_the_first_of_equal_candidates_is_chosen():
    runs = {run.name: {"accuracy": 0.5} for run in compare_runs.plan(QUICK, {})}
    assert compare_runs.answer(QUICK, runs) == {"lr": {"lr": 0.1}}
    better = next(name for name in runs if "lr0.2" in name)
    runs[better] = {"accuracy": 0.6}
    assert compare_runs.answer(QUICK, runs) == {"lr": {"lr": 0.2}}
    del runs[better]
    assert compare_runs.answer(QUICK, runs) == {}


# Verdicts

VERDICTS = [
    ((0.01, 0.02, 0.03), HOLDS),
    ((-0.01, -0.02, -0.03), FAILS),
    ((0.01, 0.02, -0.001), OPEN),
    ((0.0, 0.02, 0.02), OPEN),  # a tie is of no sign
    ((0.001, 0.001, 0.03), OPEN),  # of one sign, but the mean is within the spread
    ((-0.001, -0.001, -0.03), OPEN),
    ((0.5,), OPEN),
    ((0.01, math.nan, 0.01), OPEN),
    ((0.0, 0.0, 0.0), OPEN),
]
CLOSENESS = [
    ((0.01, -0.005, 0.0), HOLDS),
    ((0.02, 0.03, 0.04), FAILS),
    ((-0.02, -0.03, -0.04), FAILS),
    ((0.02, 0.03, 0.005), OPEN),
    ((0.02, -0.03, 0.02), OPEN),
    ((0.001,), OPEN),
    ((0.0, math.nan), OPEN),
]


@pytest.mark.parametrize(("differences", "verdict"), VERDICTS)
def test_verdict(differences, verdict):
    assert compare_claims.verdict(differences) == verdict


@pytest.mark.parametrize(("differences", "verdict"), CLOSENESS)
def test_verdict_of_closeness(differences, verdict):
    assert compare_claims.verdict_of_closeness(differences) == verdict


# accuracy of each row, in per cent; every seed is a little better than the one before
ACCURACY = {
    "sgd": 70, "sgd-longer": 60, "lookahead": 71, "sam": 80, "multistep": 79, "multistep-average": 81,
    "lookahead-sam": 78, "lookbehind": 85, "lookbehind-adaptive": 84.5, "sam-free": 75, "lookbehind-free": 82,
    "asam": 82, "multistep-asam": 83, "multistep-average-asam": 87, "lookahead-asam": 80, "lookbehind-asam": 85,
    "lookbehind-adaptive-asam": 82,
}  # fmt: skip


def made_up(key: str, accuracy: float) -> Measured:
    """The higher the accuracy, the flatter and the more robust, but for ASAM, where it is the other way round."""
    own = tuple(accuracy / 100 + shift for shift in (0, 0.001, 0.002))
    sign = -1 if key.endswith("asam") else 1
    sharpness = tuple(tuple(radius * (2 - sign * a) for radius in (1, 2)) for a in own)
    noise = tuple((a, 0.5 + sign * a / 10, 0.4 + sign * a / 10) for a in own)
    return Measured(Row(key, key, "sam", False, ()), 1, own, own, sharpness, sharpness, noise)


def test_claims_of_made_up_numbers():
    measured = {key: made_up(key, accuracy) for key, accuracy in ACCURACY.items()}
    sensitivity = {
        "sam": {0.1: (0.8, 0.8, 0.8), 0.2: (0.7, 0.71, 0.72)},
        "lookbehind": {0.1: (0.8, 0.8, 0.8), 0.2: (0.79, 0.76, 0.79)},
    }
    claims = compare_claims.judge(replace(QUICK, seeds=3), measured, sensitivity)
    verdicts = [claim.verdict for claim in claims]
    # 2: below the mean gradient's; 3 and 4: not over ASAM; 5: not over ASAM
    assert verdicts == [HOLDS, FAILS, FAILS, FAILS, FAILS, HOLDS, HOLDS, HOLDS, FAILS]
    assert [finding.verdict for finding in claims[1].findings] == [HOLDS, HOLDS, FAILS, HOLDS]
    assert [finding.verdict for finding in claims[2].findings] == [HOLDS, HOLDS, FAILS, FAILS]
    assert [finding.verdict for finding in claims[3].findings] == [HOLDS, FAILS]
    assert [finding.verdict for finding in claims[4].findings] == [HOLDS, FAILS]
    assert claims[0].findings[0].differences == pytest.approx((0.05, 0.05, 0.05))
    assert claims[5].findings[0].differences == pytest.approx((0.09, 0.05, 0.07))
    # the sharpness of both, SAM's above Lookbehind's by radius * (0.85 - 0.80)
    assert claims[2].findings[1].differences == pytest.approx((0.1, 0.1, 0.1))


def test_a_row_that_is_not_a_number_resolves_nothing():
    measured = {key: made_up(key, accuracy) for key, accuracy in ACCURACY.items()}
    measured["sam"] = replace(measured["sam"], sam_sharpness=((math.nan, math.nan),) * 3)
    sensitivity = {"sam": {0.1: (0.8,) * 3}, "lookbehind": {0.1: (0.8,) * 3}}
    claims = compare_claims.judge(replace(QUICK, seeds=3), measured, sensitivity)
    assert [finding.verdict for finding in claims[2].findings] == [OPEN, OPEN, FAILS, FAILS]
    assert claims[5].verdict == OPEN


def test_numbers_are_json():
    assert compare_report._plain({"a": (1.0, math.nan), 0.5: [math.inf]}) == {"a": [1.0, None], "0.5": [None]}


# Mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "0"], "--seeds: expected a whole number of at least 1, got '0'"),
        (["--jobs", "x"], "--jobs: expected a whole number of at least 1, got 'x'"),
        (["--data", "cifar10"], "--data"),
        (["--quick", "--data", "fashion-mnist"], "--quick: takes digits"),
        (["--nonsense"], "--nonsense"),
        (["--seed", "3"], "--seed"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capfd, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capfd, *argv)
    assert list(tmp_path.iterdir()) == []


def test_changed_settings_are_refused(whole, capfd, tmp_path):
    before = contents(whole)
    line = refused(capfd, "--quick", "--seeds", "3", "--output", str(whole))
    assert "this comparison has seeds 2, not 3" in line
    assert str(whole / "settings.json") in line
    assert "this comparison has training 256, not 1000" in refused(
        capfd, "--data", "digits", "--output", str(whole), "--results", str(tmp_path)
    )
    assert contents(whole) == before
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def begun(tmp_path: Path, whole: Path) -> Path:
    """A folder with the settings and a single result of the whole one."""
    folder = tmp_path / "begun"
    folder.mkdir()
    result = sorted(path for path in whole.glob("tune-*.json"))[0]
    for path in (whole / "settings.json", result):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def result_in(folder: Path) -> Path:
    return next(folder.glob("tune-*.json"))


DAMAGES = {
    "other data": lambda folder: change(folder / "settings.json", data="0" * 64),
    "another version's settings": lambda folder: change(folder / "settings.json", settings={"seeds": 2}),
    "no settings": lambda folder: (folder / "settings.json").unlink(),
    "half of the settings": lambda folder: (folder / "settings.json").write_text('{"settings": {'),
    "half a result": lambda folder: result_in(folder).write_text('{"run": {"purpose"'),
    "a list for a result": lambda folder: result_in(folder).write_text("[]"),
    "another run's result": lambda folder: result_in(folder).rename(folder / "tune-sgd-lr7-epochs2-seed0.json"),
    "a result without its run": lambda folder: change(result_in(folder), run={"method": "sgd"}),
    "a result without accuracy": lambda folder: change(result_in(folder), accuracy=None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_folder_that_does_not_fit_is_refused(begun, capfd, damage):
    damage(begun)
    before = contents(begun)
    assert str(begun) in refused(capfd, *QUICK_RUN, "--output", str(begun))
    assert contents(begun) == before


def test_a_change_of_versions_is_noted(begun, capfd):
    path = begun / "settings.json"
    change(path, environment=json.loads(path.read_text())["environment"] | {"torch": "1.0"})
    environment = compare.open_folder(begun, SETTINGS)
    assert environment["torch"] == "1.0"
    assert re.fullmatch("note: torch was 1.0 and is .*: the rest may differ in its last bits\n", capfd.readouterr().err)


def test_a_file_where_the_folder_should_be(tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    assert "not a folder" in refused(capfd, *QUICK_RUN, "--output", str(tmp_path / "file"))
    assert "not a folder" in refused(
        capfd, *QUICK_RUN, "--output", str(tmp_path / "new"), "--results", str(tmp_path / "file")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
