"""The comparison: what it runs, tunes and writes, how it survives kills, and how it judges."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from benchmarks import runs, workers
from benchmarks.compare import __main__ as compare
from benchmarks.compare import claims as compare_claims
from benchmarks.compare import experiment
from benchmarks.compare import report as compare_report
from benchmarks.compare.claims import Measured
from benchmarks.compare.experiment import FASHION_MNIST, QUICK, TUNED, Row, key_of
from benchmarks.compare.search import Axis, points
from benchmarks.files import UserError
from benchmarks.methods import METHODS
from benchmarks.paired import FAILS, HOLDS, OPEN
from benchmarks.runs import Run
from benchmarks.store import Store
from tests.benchmarks import folders
from tests.benchmarks.folders import contents, descendants, results_of, wait_for_results, wait_until_gone

# What one process has run serves all tests of this file.
pytestmark = pytest.mark.xdist_group("compare")

QUICK_RUN = ["--quick", "--jobs", "2"]
ROOT = Path(__file__).parents[2]
FIRST, *OTHERS = QUICK.tuning_seeds
LONGER = ("sgd", "lookahead", "sam", "lookahead-sam", "asam", "lookahead-asam")
ROWS = (
    *("sgd", "lookahead", "sam-free", "lookbehind-free", "sam-quarter", "lookbehind-quarter"),
    *("sam", "multistep", "multistep-average", "lookahead-sam", "lookbehind", "lookbehind-adaptive"),
    *("lookbehind-within", "asam", "multistep-asam", "multistep-average-asam", "lookahead-asam", "lookbehind-asam"),
    *("lookbehind-adaptive-asam", "lookbehind-within-asam", *(f"{key}-longer" for key in LONGER)),
    *("sam-m2", "lookbehind-m2", "first-sam-0.5", "last-sam-0.5"),
)
PICTURES = {
    f"compare-{name}.png" for name in ("accuracy", "evaluations", "sharpness", "noise", "sensitivity", "training")
}
refused = partial(folders.refused, compare.main, "benchmarks.compare")


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
    names = ("method", "asam", "lr", "epochs", "rho", "k", "alpha", "microbatches", "sam_epochs")
    for key, row in content["rows"].items():
        finals = [
            result
            for result in results.values()
            if result["run"]["purpose"] == "final" and all(result["run"][name] == row[name] for name in names)
        ]
        finals.sort(key=lambda result: result["run"]["seed"])
        assert [result["run"]["seed"] for result in finals] == list(QUICK.seeds), key
        assert row["accuracy"] == pytest.approx([result["accuracy"] for result in finals], rel=1e-4)
        assert row["evaluations"] == finals[0]["evaluations"]
        noise = [[sum(level) / len(level) for level in result["noise"]] for result in finals]
        assert [value for seed in row["noise"] for value in seed] == pytest.approx(
            [value for seed in noise for value in seed], rel=1e-4
        )
        assert [seed[-1][0] for seed in row["history"]] == [result["evaluations"] for result in finals]


def test_the_planned_cost_is_what_was_measured(whole):
    """Every method's gradients, and as many for those that train longer as for Lookbehind over the same ball."""
    for result in results_of(whole).values():
        assert result["evaluations"] == Run(**result["run"]).cost * (QUICK.training // QUICK.batch_size)
    rows = json.loads((whole / "compare.json").read_text())["rows"]
    for key in LONGER:
        lookbehind = rows["lookbehind-asam" if key.endswith("asam") else "lookbehind"]
        # a whole number of epochs: half of one at most is missing or too much
        half = METHODS[rows[key]["method"]].gradients[1] * (QUICK.training // QUICK.batch_size) / 2
        assert abs(rows[f"{key}-longer"]["evaluations"] - lookbehind["evaluations"]) <= half
        assert rows[f"{key}-longer"]["evaluations"] > rows[key]["evaluations"]
    assert {row["epochs"] for key, row in rows.items() if not key.endswith("-longer")} == {QUICK.epochs}


def test_every_method_was_tuned_alike_and_the_best_was_chosen(whole):
    """As many points for each, one of which every row has; the finalists are the best points of the first seed."""
    content, results = json.loads((whole / "compare.json").read_text()), results_of(whole)
    assert list(content["chosen"]) == [key_of(*which) for which in TUNED] == list(content["tuning"])
    for method, asam in TUNED:
        key = key_of(method, asam)
        tuned = [
            r for r in results.values()
            if r["run"]["purpose"] == "tune" and (r["run"]["method"], r["run"]["asam"]) == (method, asam)
        ]  # fmt: skip
        first = [r for r in tuned if r["run"]["seed"] == FIRST]
        assert len(first) == 2**QUICK.trials == len(content["tuning"][key])
        assert len(tuned) == len(first) + QUICK.finalists * len(OTHERS)
        finalist = [r["run"] for r in tuned if r["run"]["seed"] in OTHERS]
        chosen = content["chosen"][key]
        assert all(finalist[0][name] == value for name, value in chosen.items())
        of_finalist = next(r for r in first if all(r["run"][name] == value for name, value in chosen.items()))
        assert of_finalist["accuracy"] == max(r["accuracy"] for r in first)
        assert set(chosen) == {"lr", *METHODS[method].uses}
        assert all(content["rows"][key][name] == value for name, value in chosen.items())


def test_the_markdown_says_what_the_numbers_say(whole):
    text = (whole / "compare.md").read_text()
    content = json.loads((whole / "compare.json").read_text())
    for row in content["rows"].values():
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['label']} |"))
        assert f"| {row['evaluations']:,.0f} | {100 * sum(row['accuracy']) / len(QUICK.seeds):.1f} (" in line
    assert len(content["claims"]) == 17
    seconds = sum(json.loads(path.read_text())["seconds"] for path in whole.glob("*-*.json"))
    assert content["seconds"] == pytest.approx(seconds, rel=1e-4)
    assert f"All runs trained for {seconds / 3600:.1f} hours" in text
    assert "with ascents on a quarter 2 times as large, by the rule of fractions.md" in text
    for claim in content["claims"]:
        verdict = claim["verdict"] + (" with 2 seeds" if claim["verdict"] == OPEN else "")
        source = f" ({claim['source']})" if claim["source"] else ""
        assert f"{claim['text']}{source}** | **{verdict}** |" in text
        for finding in claim["findings"]:
            assert finding["text"] in text
            assert len(finding["differences"]) == len(QUICK.seeds)
    assert f"torch {torch.__version__}" in text
    assert content["data"][:16] in text
    assert "python -m benchmarks.compare --quick --jobs 2" in text


def test_the_pictures_are_drawn(whole):
    assert {path.name for path in whole.glob("*.png")} == PICTURES
    assert {*re.findall(r"^!\[.+\]\((.+)\)$", (whole / "compare.md").read_text(), re.MULTILINE)} == PICTURES
    for name in PICTURES:
        picture = imread(whole / name)[..., :3]
        assert picture.shape[1] in (1800, 2000, 2200, 2400, 2600)
        assert 0.01 < (picture.min(axis=2) < 0.9).mean() < 0.5, name


def test_a_second_start_runs_nothing_and_repeats_the_table(whole, capfd, monkeypatch):
    before = contents(whole)
    monkeypatch.setattr(
        workers, "run_missing", lambda perform, missing, *_: pytest.fail("a run") if missing(()) else None
    )
    assert compare.main([*QUICK_RUN, "--output", str(whole)]) == 0
    output = capfd.readouterr()
    assert output.out.startswith("| method | lr | rho | k | alpha | evaluations |")
    assert output.err.startswith(f"about 0 of {len(results_of(whole))} runs and 0 gradient evaluations to do")
    after = contents(whole)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"compare.md", "compare.json"}, "only the command in them"
    assert before.keys() == after.keys()


def test_the_estimate_does_nothing_else(tmp_path, capfd):
    assert compare.main(["--quick", "--estimate", "--output", str(tmp_path / "new")]) == 0
    assert re.fullmatch(r"about (\d+) of \1 runs and [\d,]+ gradient evaluations to do\n", capfd.readouterr().err)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["settings.json"]


# Interruptions


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.compare", *QUICK_RUN, "--output", str(folder)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


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

    for _ in range(20):
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
    assert said.endswith("\ninterrupted; the same command goes on with the runs that are missing\n")
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
        (Run("tune", "sam", 0, lr=0.1, epochs=1, rho=-1.0), UserError, "rho: expected a finite number >= 0"),
        (Run("tune", "nothing", 0, lr=0.1, epochs=1), RuntimeError, "KeyError: 'nothing'"),
    ],
    ids=lambda value: getattr(value, "method", None),
)
def test_a_run_that_raises_ends_the_comparison_and_says_why(run, error, message):
    with pytest.raises(error, match=message):
        workers.run_missing(
            partial(runs.perform, QUICK), lambda under_way: None if run in under_way else run,
            lambda run, result: pytest.fail("there is no result"), lambda: (0, 1, ""), 1, "trial",
        )  # fmt: skip


# What a run is given


def test_no_test_image_is_used_in_tuning():
    """With NaN for every test image the tuning runs give the same results, bit for bit; the final ones do not."""
    images = runs.load(QUICK)
    poisoned = replace(images, test_images=torch.full_like(images.test_images, math.nan))
    plan = experiment.plan(QUICK, {}, guessed=True)
    tuning = {run.method: run for run in plan if run.purpose == "tune" and not run.asam}
    assert len(tuning) == 13
    for run in tuning.values():
        clean, other = (dict(runs.perform(QUICK, run, x)) for x in (images, poisoned))
        assert clean | {"seconds": 0} == other | {"seconds": 0}
    final = next(run for run in plan if run.purpose == "final" and run.epochs == QUICK.epochs)
    clean, other = (dict(runs.perform(QUICK, final, x)) for x in (images, poisoned))
    assert clean["accuracy"] != other["accuracy"]


def test_validation_images_are_not_trained_on_and_have_wrong_labels_too():
    images = runs.load(QUICK)
    given = {purpose: runs.images_of(QUICK, Run(purpose, "sgd", 1, 0.1, 1), images) for purpose in ("tune", "final")}
    assert torch.equal(given["tune"].train_images, given["final"].train_images)
    assert torch.equal(given["tune"].train_labels, given["final"].train_labels)
    assert torch.equal(given["tune"].train_images, images.train_images[:128])
    assert torch.equal(given["tune"].test_images, images.train_images[128:192])
    assert torch.equal(given["final"].test_images, images.test_images)
    assert torch.equal(given["final"].test_labels, images.test_labels)
    wrong = [
        (given["tune"].train_labels != images.train_labels[:128]).sum(),
        (given["tune"].test_labels != images.train_labels[128:192]).sum(),
    ]
    assert sum(wrong) == round(0.2 * 192)
    assert min(wrong) > 5
    other = runs.images_of(QUICK, Run("tune", "sgd", 0, 0.1, 1), images)
    assert not torch.equal(other.train_labels, given["tune"].train_labels)


def test_a_diverged_run_is_a_result():
    result = runs.perform(QUICK, Run("final", "sgd", 0, lr=1e20, epochs=1))
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


def test_points_are_spread_evenly_in_every_option_and_shared_ones_are_the_same():
    """Eight points: one in each eighth of a range (of its logarithm), the whole numbers in turn."""
    settings = FASHION_MNIST
    tried = {which: points(experiment.space(settings, *which), settings.trials) for which in TUNED}
    assert {len(found) for found in tried.values()} == {8}
    for (method, asam), found in tried.items():
        low, high = settings.asam_rhos if asam else settings.sam_rhos
        if method.endswith("quarter"):  # by the rule: 1 / √(1/4)
            low, high = 2 * low, 2 * high
        if "rho" in METHODS[method].uses:
            places = sorted(math.log(own["rho"] / low) / math.log(high / low) for own in found)
            # two digits of rho are 5 % of it at most, of which the logarithm's range has 320 or 300
            assert all(eighth / 8 - 0.02 <= place <= (eighth + 1) / 8 + 0.02 for eighth, place in enumerate(places))
        if "k" in METHODS[method].uses:
            ks = settings.lookahead_ks if method.startswith("lookahead") else settings.ks
            assert {own["k"] for own in found} == set(ks)
        assert [own["lr"] for own in found] == [own["lr"] for own in tried["sgd", False]]
        assert len({tuple(own.values()) for own in found}) == 8
        assert found == points(experiment.space(settings, method, asam), settings.trials)


def test_values_of_an_axis():
    assert [Axis((2, 3, 5)).at(place) for place in (0, 0.33, 0.34, 0.999)] == [2, 2, 3, 5]
    assert [Axis((0.2, 0.9)).at(place) for place in (0, 0.5)] == [0.2, 0.55]
    assert [Axis((0.01, 1.0), logarithmic=True).at(place) for place in (0, 0.5)] == [0.01, 0.1]


def done_by(settings, accuracy) -> dict:
    """Tuning runs as though they were done, until there is nothing more to tune."""
    done = {}
    while new := [run for run in experiment.plan(settings, done) if run.purpose == "tune" and run.name not in done]:
        done |= {run.name: {"accuracy": accuracy(run)} for run in new}
    return done


def test_the_plan_grows_with_the_answers():
    """First the points with one seed; then the finalists with the others; then the rest."""
    settings = FASHION_MNIST
    first = experiment.plan(settings, {})
    assert {(run.purpose, run.seed) for run in first} == {("tune", 100)}
    assert len(first) == 8 * len(TUNED)
    done = {run.name: {"accuracy": 0.5} for run in first}
    second = [run for run in experiment.plan(settings, done) if run.name not in done]
    assert {(run.purpose, run.seed) for run in second} == {("tune", 101), ("tune", 102)}
    assert len(second) == 2 * 2 * len(TUNED)
    everything = experiment.plan(settings, done_by(settings, lambda run: 0.5))
    finals = [run for run in everything if run.purpose == "final"]
    assert {run.seed for run in finals} == set(settings.seeds)
    assert len(finals) == 5 * (len(TUNED) + len(LONGER) + 4 + 6)
    assert set(settings.seeds).isdisjoint(settings.tuning_seeds)
    assert len({run.name for run in everything}) == len(everything)
    explored = [run for run in everything if run.purpose == "explore" and run.method == "lookbehind"]
    assert {run.seed for run in explored} == set(settings.tuning_seeds)
    assert len(experiment.plan(settings, {}, guessed=True)) == pytest.approx(len(everything), rel=0.05)


def test_the_best_finalist_by_the_mean_over_all_tuning_seeds_is_chosen():
    """Not the best of the first seed; the first of equals."""
    tried = [own for own, _ in experiment.trials(FASHION_MNIST, "sgd", False, 100)]

    def accuracy(run: Run) -> float:
        place = next(i for i, own in enumerate(tried) if own["lr"] == run.lr)
        if run.seed == 100:
            return {3: 0.7, 5: 0.69}.get(place, 0.5)
        return {3: 0.6, 5: 0.65}[place]

    answers = experiment.answer(FASHION_MNIST, done_by(FASHION_MNIST, accuracy))
    assert answers["sgd"] == tried[5]
    even = experiment.answer(FASHION_MNIST, done_by(FASHION_MNIST, lambda run: 0.5))
    assert even["sgd"] == tried[0]
    assert experiment.answer(FASHION_MNIST, {}) == {}


# Verdicts

# accuracy of each row, in per cent; every seed is a little better than the one before
ACCURACY = {
    "sgd": 70, "sgd-longer": 60, "lookahead": 71, "lookahead-longer": 71, "sam": 80, "sam-longer": 81,
    "multistep": 79, "multistep-average": 81, "lookahead-sam": 78, "lookahead-sam-longer": 79, "lookbehind": 85,
    "lookbehind-adaptive": 84.7, "lookbehind-within": 82, "sam-free": 75, "lookbehind-free": 82, "sam-m2": 81,
    "sam-quarter": 79.6, "lookbehind-quarter": 83,
    "lookbehind-m2": 83, "first-sam-0.5": 83, "last-sam-0.5": 84,
    "asam": 82, "asam-longer": 83, "multistep-asam": 83, "multistep-average-asam": 87, "lookahead-asam": 80,
    "lookahead-asam-longer": 81, "lookbehind-asam": 85, "lookbehind-adaptive-asam": 82, "lookbehind-within-asam": 86,
}  # fmt: skip


def made_up(key: str, accuracy: float) -> Measured:
    """The higher the accuracy, the flatter and the more robust, but for ASAM, where it is the other way round."""
    own = tuple(accuracy / 100 + shift for shift in (0, 0.001, 0.002))
    sign = -1 if key.endswith("asam") else 1
    sharpness = tuple(tuple(radius * (2 - sign * a) for radius in (1, 2)) for a in own)
    noise = tuple((a, 0.5 + sign * a / 10, 0.4 + sign * a / 10) for a in own)
    history = tuple(((10, a / 2), (20, a), (30, a)) for a in own)
    return Measured(Row(key, key, "sam", False, ()), 30, own, own, sharpness, sharpness, noise, history, ())


def test_claims_of_made_up_numbers():
    measured = {key: made_up(key, accuracy) for key, accuracy in ACCURACY.items()}
    over_rho = {
        "sam": ((0.8, 0.8, 0.8), (0.7, 0.71, 0.72)),
        "multistep": ((0.8, 0.8, 0.8), (0.5, 0.51, 0.52)),
        "lookbehind": ((0.8, 0.8, 0.8), (0.79, 0.77, 0.79)),
    }
    claims = compare_claims.judge(replace(QUICK, seeds=(0, 1, 2)), measured, over_rho)
    verdicts = [claim.verdict for claim in claims]
    # 2: below the mean gradient's; 3: not over ASAM; 4 and 5: not over ASAM; 10: not over ASAM; 13: neither;
    # 16: by two points; 17: ASAM more accurate, but less robust
    expected = [HOLDS, FAILS, FAILS, FAILS, FAILS, HOLDS, HOLDS, HOLDS, HOLDS, FAILS, HOLDS, HOLDS, FAILS]
    expected += [HOLDS, HOLDS, FAILS, FAILS]
    assert verdicts == expected
    assert [finding.verdict for finding in claims[1].findings] == [HOLDS, HOLDS, HOLDS, FAILS, HOLDS]
    assert [finding.verdict for finding in claims[2].findings] == [HOLDS, FAILS]
    assert [finding.verdict for finding in claims[3].findings] == [HOLDS, HOLDS, FAILS, FAILS]
    assert [finding.verdict for finding in claims[4].findings] == [HOLDS, FAILS]
    assert claims[0].findings[1].differences == pytest.approx((0.05, 0.05, 0.05))
    assert claims[5].findings[0].differences == pytest.approx((0.09, 0.06, 0.07))
    # the sharpness of both, SAM's above Lookbehind's by radius * (0.85 - 0.80)
    assert claims[3].findings[1].differences == pytest.approx((0.1, 0.1, 0.1))
    # half of three looks is the second: 85 against 80 per cent
    assert claims[7].findings[0].differences == pytest.approx((0.05, 0.05, 0.05))
    assert (
        claims[13].text == "SAM with ascents on a quarter of the minibatch comes close to SAM at 0.625 of its gradients"
    )
    assert claims[13].findings[0].differences == pytest.approx((-0.004, -0.004, -0.004))
    assert [finding.verdict for finding in claims[16].findings] == [HOLDS, HOLDS, HOLDS, FAILS]
    assert claims[14].findings[0].differences == pytest.approx((0.096, 0.096, 0.096))
    assert measured["sam"].best == pytest.approx((2 / 3,) * 3)


def test_a_row_that_is_not_a_number_resolves_nothing():
    measured = {key: made_up(key, accuracy) for key, accuracy in ACCURACY.items()}
    measured["sam"] = replace(measured["sam"], sam_sharpness=((math.nan, math.nan),) * 3)
    over_rho = {method: ((0.8,) * 3,) for method in ("sam", "multistep", "lookbehind")}
    claims = compare_claims.judge(replace(QUICK, seeds=(0, 1, 2)), measured, over_rho)
    assert [finding.verdict for finding in claims[3].findings] == [OPEN, OPEN, FAILS, FAILS]
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
    assert "begun with seeds [0, 1], not [0, 1, 2]" in line
    assert str(whole / "settings.json") in line
    assert "begun with training 128, not 640" in refused(
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
    "another version's settings": lambda folder: change(folder / "settings.json", settings={"seeds": [0, 1]}),
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
    content = json.loads(path.read_text())
    store = Store(begun, content["settings"], content["data"], Run)
    assert store.environment["torch"] == "1.0"
    assert re.fullmatch("note: torch was 1.0 and is .*: the rest may differ\n", capfd.readouterr().err)


def test_a_file_where_the_folder_should_be(tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    assert "not a folder" in refused(capfd, *QUICK_RUN, "--output", str(tmp_path / "file"))
    assert "not a folder" in refused(
        capfd, *QUICK_RUN, "--output", str(tmp_path / "new"), "--results", str(tmp_path / "file")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
