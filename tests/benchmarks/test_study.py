"""The main job's own comparison: what it runs and chooses, what it says, and how it survives kills."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from benchmarks import runs, workers
from benchmarks.runs import Run
from benchmarks.train import __main__ as train
from benchmarks.train import report as reports
from benchmarks.train import study
from benchmarks.train.report import Report, Shown
from benchmarks.train.study import QUICK, SHOWN
from tests.benchmarks.folders import contents, descendants, refused, results_of, wait_for_results, wait_until_gone

# What one process has run serves all tests of this file.
pytestmark = pytest.mark.xdist_group("study")

ROOT = Path(__file__).parents[2]
QUICK_RUN = ["--quick", "--jobs", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A quick comparison: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "train"
    command = [sys.executable, "-m", "benchmarks.train", *QUICK_RUN, "--output", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_every_method_is_shown_at_the_rho_that_the_tuning_seeds_chose(whole):
    folder, _ = whole
    content, results = json.loads((folder / "train.json").read_text()), results_of(folder)
    assert list(content["chosen"]) == list(QUICK.methods)
    assert content["chosen"].pop("sgd") is None
    for method, rho in content["chosen"].items():
        tuned = [r for r in results.values() if r["run"]["purpose"] == "tune" and r["run"]["method"] == method]
        assert {r["run"]["seed"] for r in tuned} == set(QUICK.tuning_seeds)
        best = max(r["accuracy"] for r in tuned)
        assert rho == min(r["run"]["rho"] for r in tuned if r["accuracy"] == best)
        shown = [results[run.name] for run in study.candidates(QUICK, "final", method)[rho]]
        assert content["best"][method]["accuracy"] == [r["accuracy"] for r in shown]
        assert content["best"][method]["evaluations"] == shown[0]["evaluations"]
    assert set(QUICK.seeds).isdisjoint(QUICK.tuning_seeds)
    assert set(SHOWN.seeds).isdisjoint(SHOWN.tuning_seeds)
    assert len(SHOWN.seeds) == 5


def test_rho_is_chosen_without_a_test_image():
    """By the mean over tuning seeds; the final runs may say what they like, or be missing."""
    done = {run.name: {"accuracy": 0.5} for run in study.plan(SHOWN) if run.purpose == "tune"}
    first = {"sgd": None, "sam": 0.05, "sam-quarter": 0.1, "multistep": 0.05, "lookbehind": 0.05}
    assert study.best_rhos(SHOWN, done) == first
    for run in study.candidates(SHOWN, "tune", "sam")[0.2]:
        done[run.name] = {"accuracy": 0.4 if run.seed == 100 else 0.7}
    assert study.best_rhos(SHOWN, done)["sam"] == 0.2


def test_ascents_on_a_quarter_have_the_same_rhos_twice_as_large_and_whole_numbers_of_gradients(whole):
    """In the plan, the numbers, both tables that have rho, and the text."""
    assert {run.rho for run in study.plan(SHOWN) if run.method == "sam-quarter"} == {0.1, 0.2, 0.4}
    assert {run.rho for run in study.plan(SHOWN) if run.method == "sam"} == {0.05, 0.1, 0.2}
    folder, out = whole
    content = json.loads((folder / "train.json").read_text())
    for kind in ("over_rho", "validation"):
        assert list(content[kind]["sam-quarter"]) == ["0.1", "0.2", "0.4"]
        assert list(content[kind]["multistep"]) == ["0.05", "0.1", "0.2"]
    # two epochs of two steps: 1 + 1/4 gradients a step
    steps = QUICK.epochs * QUICK.training // QUICK.batch_size
    assert content["best"]["sam-quarter"]["evaluations"] == 1.25 * steps == 5
    rho = content["chosen"]["sam-quarter"]
    for text in (out, (folder / "train.md").read_text()):
        cells = [re.split(r" *\| *| {2,}", line.strip("| ")) for line in text.splitlines()]
        row = next(line for line in cells if line[0] == "SAM with ascents on a quarter")
        assert row[1:3] == [f"{rho:g}", "5"]
        over_rho = next(line for line in cells if line[0] == "SAM with ascents on a quarter, rhos 2 times as large")
        for cell, shown in zip(over_rho[1:], content["over_rho"]["sam-quarter"].values(), strict=False):
            assert cell.startswith(f"{100 * sum(shown['accuracy']) / len(QUICK.seeds):.1f} (")
        assert "for SAM with ascents on a quarter 2 times as large, by the rule of benchmarks/results/fractions" in text


def test_what_is_printed(whole):
    folder, out = whole
    content = json.loads((folder / "train.json").read_text())
    lines = out.splitlines()
    assert lines[-1] == content["conclusion"]
    assert lines[-1].startswith("In words: ")
    markdown = (folder / "train.md").read_text()
    assert content["conclusion"] in markdown
    assert "`python -m benchmarks.train --quick --jobs 2 --output " in markdown
    assert content["data"][:16] in markdown
    assert out.count(" minus ") == markdown.count(" minus ") == 10  # every pair of five methods
    for method in QUICK.methods:
        accuracy = content["best"][method]["accuracy"]
        assert f"{100 * sum(accuracy) / len(accuracy):.1f} (" in out


def test_the_picture_shows_every_method(whole):
    from matplotlib.colors import to_rgb

    from benchmarks.methods import METHODS

    picture = imread(whole[0] / "train.png")[..., :3]
    third = picture.shape[1] // 3
    for method in QUICK.methods:
        painted = (abs(picture - to_rgb(METHODS[method].colour)) < 0.01).all(axis=2)
        assert all(painted[:, place * third : (place + 1) * third].sum() > 100 for place in range(3)), method


def test_a_second_start_runs_nothing_and_says_the_same(whole, capfd, monkeypatch):
    folder, out = whole
    monkeypatch.setattr(
        workers, "run_missing", lambda perform, missing, *_: pytest.fail("a run") if missing(()) else None
    )
    assert train.main([*QUICK_RUN, "--output", str(folder)]) == 0
    assert capfd.readouterr().out == out


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_results(tmp_path, whole):
    folder = tmp_path / "train"
    command = [sys.executable, "-m", "benchmarks.train", *QUICK_RUN, "--output", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_results(folder, process, 6)
    workers = descendants(process.pid)
    process.kill()
    process.wait()
    process.stderr.close()
    wait_until_gone(workers)
    there = {name: content for name, content in contents(folder).items() if name.endswith(".json")}
    assert train.main([*QUICK_RUN, "--output", str(folder)]) == 0
    assert results_of(folder) == results_of(whole[0])
    assert all((folder / name).read_bytes() == content for name, content in there.items())


# What a run is given and gives


def test_the_test_images_are_not_used_before_the_end():
    """With NaN for every test image a tuning run gives the same result, bit for bit."""
    images = runs.load(QUICK)
    poisoned = replace(images, test_images=images.test_images * math.nan)
    run = study.candidates(QUICK, "tune", "lookbehind")[0.1][0]
    clean, other = (dict(runs.perform(QUICK, run, x)) for x in (images, poisoned))
    assert clean | {"seconds": 0} == other | {"seconds": 0}
    assert len(images.train_images) == QUICK.training + QUICK.validation


def test_looking_at_a_run_on_its_way_does_not_change_it():
    """Weights and accuracies at the end, and evaluations, are those of a run that nobody has looked at."""
    run = Run("final", "lookahead-sam", 3, lr=0.1, epochs=4, rho=0.1, k=3, alpha=0.5)
    often, once = (dict(runs.perform(replace(QUICK, looks=looks), run)) for looks in (4, 1))
    assert [evaluations for evaluations, _ in often["history"]] == [4, 8, 12, 16]
    assert often["history"][-1] == once["history"][-1]
    assert often["history"][-1][1] == often["accuracy"]
    for name in ("accuracy", "loss", "evaluations", "training_accuracy", "sam_sharpness"):
        assert often[name] == once[name], name


@pytest.mark.parametrize(("sam_epochs", "expected"), [(1, [2, 2, 4, 4, 4, 4]), (-1, [4, 4, 4, 4, 2, 2])])
def test_stages_are_switched_between_epochs(monkeypatch, sam_epochs, expected):
    """SAM's two gradients a step in its stage, k + 1 in the other; alpha is 1 in SAM's stage alone."""
    run = Run("final", "lookbehind", 0, lr=0.1, epochs=3, rho=0.1, k=3, alpha=0.5, sam_epochs=sam_epochs)
    result = runs.perform(replace(QUICK, looks=3), run)
    steps = QUICK.training // QUICK.batch_size
    assert result["evaluations"] == sum(expected) == steps * run.cost
    ends = [sum(expected[: steps * (epoch + 1)]) for epoch in range(3)]
    assert [evaluations for evaluations, _ in result["history"]] == ends
    assert result["alpha"] == pytest.approx([1.0 if count == 2 else 0.5 for count in expected[::steps]])


def test_sam_for_all_but_one_epoch_differs_from_both():
    """The stages are really those of SAM and Lookbehind: one epoch of either makes other weights."""
    losses = {
        runs.perform(QUICK, Run("tune", "lookbehind", 0, 0.1, 3, rho=0.1, k=2, alpha=0.5, sam_epochs=n))["loss"]
        for n in (None, 1, 2, -1)
    }
    assert len(losses) == 4


# What it says in words


def made_up(sam: tuple, lookbehind: tuple, quarter: tuple = ()) -> Report:
    """SGD at 70 %, the others' accuracies at rho 0.1 and 0.2 as given, in per cent; each seed a little better.

    `quarter`: those of SAM with ascents on a quarter, at rho 0.2 and 0.4; without it that is not among the methods.
    """
    given = (("sam", sam, 20), ("sam-quarter", quarter, 12.5), ("lookbehind", lookbehind, 40))
    given = tuple(entry for entry in given if entry[1])
    settings = replace(SHOWN, methods=("sgd", *(method for method, _, _ in given)), rhos=(0.1, 0.2), seeds=(0, 1, 2))

    def shown(method: str, rho: float | None, accuracy: float, evaluations: float) -> Shown:
        own = tuple((accuracy + shift) / 100 for shift in (0, 0.5, 1))
        return Shown(method, rho, evaluations, own, own, (1.0,) * 3, ())

    over_rho = {
        method: {
            rho: shown(method, rho, value, cost)
            for rho, value in zip(study.rhos_of(settings, method), values, strict=True)
        }
        for method, values, cost in given
    }
    best = {"sgd": shown("sgd", None, 70, 10)} | {method: list(of.values())[-1] for method, of in over_rho.items()}
    return Report(settings, best, over_rho, {}, {}, "")


def test_the_conclusion_says_what_was_seen_and_also_what_one_does_not_hope():
    better = reports.conclusion(made_up((80, 85), (88, 90)))
    assert "SAM and Lookbehind-SAM are more accurate than SGD" in better
    assert "Lookbehind-SAM is more accurate than SAM" in better
    assert "(+5.0 (+5.0 to +5.0) points, with 2 times its gradients)" in better
    assert "it depends less on rho (2.0 against 5.0 points over the two)" in better
    worse = reports.conclusion(made_up((88, 90), (60, 70)))
    assert "SAM is more accurate than SGD" in worse
    assert "Lookbehind-SAM is less accurate than SAM" in worse
    assert "it depends more on rho (10.0 against 2.0 points over the two)" in worse
    same = reports.conclusion(made_up((60, 70), (60, 70)))
    assert "no other method is more accurate than SGD" in same
    assert "Lookbehind-SAM is not told apart in accuracy from SAM" in same
    assert "it depends neither clearly less nor clearly more on rho" in same
    assert "quarter" not in better + worse + same


@pytest.mark.parametrize(
    ("accuracy", "words", "gap"),
    [
        (90, "is more accurate than", "+5.0 (+5.0 to +5.0)"),
        (80, "is less accurate than", "-5.0 (-5.0 to -5.0)"),
        (85, "is not told apart in accuracy from", "+0.0 (+0.0 to +0.0)"),
    ],
)
def test_the_conclusion_says_what_an_ascent_on_a_quarter_is_against_sam(accuracy, words, gap):
    """Once, at the end, whatever it is; what is said of Lookbehind stays as it is without it."""
    with_it = reports.conclusion(made_up((80, 85), (88, 90), (75, accuracy)))
    clause = (
        f"SAM with ascents on a quarter {words} SAM, both at their best rho ({gap} points, with 0.625 times its "
        "gradients)"
    )
    assert with_it.endswith(f"; {clause}.")
    assert "SAM, SAM with ascents on a quarter and Lookbehind-SAM are more accurate than SGD" in with_it
    assert with_it.split("; ")[1:-1] == reports.conclusion(made_up((80, 85), (88, 90)))[:-1].split("; ")[1:]


# Mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--quick", "--k", "3"], "--quick: belongs to the comparison, not to a single run"),
        (["--jobs", "2", "--resume"], "--jobs: belongs to the comparison"),
        (["--jobs", "0"], "--jobs: expected a whole number of at least 1, got '0'"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together(tmp_path, monkeypatch, capfd, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(train.main, "benchmarks.train", capfd, *argv)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else_is_refused(tmp_path, capfd, whole):
    (tmp_path / "file").write_text("mine")
    for more in (
        ["--output", str(tmp_path / "file")],
        ["--results", str(tmp_path / "file"), "--output", str(whole[0])],
    ):
        assert "not a folder" in refused(train.main, "benchmarks.train", capfd, "--quick", *more)
    before = contents(whole[0])
    line = refused(train.main, "benchmarks.train", capfd, "--output", str(whole[0]))
    assert "begun with training 128, not 640" in line
    assert contents(whole[0]) == before
