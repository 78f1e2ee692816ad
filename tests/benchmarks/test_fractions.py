"""Ascents on a part of the minibatch beside other ways to save gradients: what is run, chosen, timed and said."""

import itertools
import json
import re
import statistics
from functools import partial

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from benchmarks import runs, workers
from benchmarks.fractions import __main__ as fractions
from benchmarks.fractions import picture, report, study
from benchmarks.fractions.report import SAM, SGD, Report
from benchmarks.fractions.study import KINDS, QUICK, SHOWN, Run, Way
from benchmarks.job import Job
from benchmarks.paired import Interval
from benchmarks.spread import Spread
from tests.benchmarks import folders
from tests.benchmarks.folders import contents, results_of

# What one process has run serves all tests of this file.
pytestmark = pytest.mark.xdist_group("fractions")

QUICK_RUN = ["--quick", "--jobs", "1", "--rounds", "2"]
STEPS = QUICK.epochs * QUICK.training // QUICK.batch_size
refused = partial(folders.refused, fractions.main, "benchmarks.fractions")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A quick study, its report in the same folder. Stopped once, it has gone on with what was missing."""
    folder = tmp_path_factory.mktemp("whole") / "fractions"
    run_missing, names = workers.run_missing, []

    def stops(perform, missing, keep, progress, jobs, description):
        def keeps(run, result):
            if len(names) == 5:
                raise KeyboardInterrupt
            names.append(run.name)
            keep(run, result)

        run_missing(perform, missing, keeps, progress, jobs, description)

    def here(perform, missing, keep, *_):  # without the seconds that a process needs to start
        while (run := missing(())) is not None:
            names.append(run.name)
            keep(run, perform(run))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "run_missing", stops)
        assert fractions.main([*QUICK_RUN, "--output", str(folder)]) == 130
        assert len(names) == 5
        assert {path.stem for path in folder.glob("*-*.json")} == {*names}
        patch.setattr(workers, "run_missing", here)
        assert fractions.main([*QUICK_RUN, "--output", str(folder)]) == 0
    assert len(names) == len({*names}) == len(study.plan(QUICK))
    return folder


def test_every_way_is_there_with_every_seed_at_the_rho_that_other_seeds_chose(whole):
    content, results = json.loads((whole / "fractions.json").read_text()), results_of(whole)
    assert [row["label"] for row in content["rows"]] == [way.label(QUICK) for way in study.ways(QUICK)]
    assert {row["kind"] for row in content["rows"]} == KINDS.keys()
    assert {*QUICK.seeds}.isdisjoint(QUICK.tuning_seeds)
    assert {*SHOWN.seeds}.isdisjoint(SHOWN.tuning_seeds)
    for way, row in zip(study.ways(QUICK), content["rows"], strict=True):
        for rho, of_rho in way.runs(QUICK, "final").items():
            shown = row["accuracy"]["" if rho is None else f"{rho:g}"]
            assert shown == [results[run.name]["accuracy"] for run in of_rho]
            assert [run.seed for run in of_rho] == [*QUICK.seeds]
        if way.kind == "sgd":
            assert row["chosen"] is None
        else:
            tuned = {rho: results[of_rho[0].name]["accuracy"] for rho, of_rho in way.runs(QUICK, "tune").items()}
            assert row["chosen"] == max(tuned, key=tuned.get)
    settings = json.loads((whole / "settings.json").read_text())
    assert content["settings"] == settings["settings"]
    assert content["data"] == settings["data"]


def test_what_is_written(whole, capfd, monkeypatch):
    """Tables and sentences have the numbers of the JSON; a second start runs nothing."""
    text, content = (whole / "fractions.md").read_text(), json.loads((whole / "fractions.json").read_text())
    rows = {row["label"]: row for row in content["rows"]}
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    of_sgd = [100 * x for x in rows["SGD"]["accuracy"][""]]
    for label, row in rows.items():
        cells = next(cells for cells in table if cells[0] == label)
        accuracy = [100 * x for x in row["accuracy"]["" if row["chosen"] is None else f"{row['chosen']:g}"]]
        assert cells[1] == f"{row['gradients']:g}"
        assert cells[3] == ("" if row["chosen"] is None else f"{row['chosen']:g}")
        assert cells[4].startswith(f"{statistics.mean(accuracy):.1f} (")
        if label != "SGD":
            gap = Interval.of([x - y for x, y in zip(accuracy, of_sgd, strict=True)])
            assert cells[5] == gap.show(1, 1, True)
    for sentence in content["conclusion"]:
        assert f"- {sentence}" in text
    assert f"at commit {content['environment']['commit']}" in text
    before = {name: data for name, data in contents(whole).items() if re.search("-seed", name)}
    monkeypatch.setattr(study, "perform", lambda *_: pytest.fail("a run"))
    assert fractions.main([*QUICK_RUN, "--output", str(whole)]) == 0
    assert {name: data for name, data in contents(whole).items() if re.search("-seed", name)} == before
    assert capfd.readouterr().out.splitlines()[-1] == content["conclusion"][-1]


def test_the_picture_shows_every_kind(whole):
    image = imread(whole / "fractions.png")[..., :3]
    for kind, (colour, _) in picture.LOOKS.items():
        assert (abs(image - to_rgb(colour)) < 0.01).all(axis=2).sum() > 100, kind
    assert picture.LOOKS.keys() == KINDS.keys()


@pytest.mark.parametrize(
    ("method", "run"),
    [
        ("sgd", Run("final", "sgd", 3)),
        ("sam", Run("final", "sam", 3, 1.0, 0.2)),
        ("sam-quarter", Run("final", "sam", 3, 0.25, 0.2)),
        ("sam-free", Run("final", "free", 3, 1.0, 0.2)),
        ("lookbehind", Run("final", "lookbehind", 3, 1.0, 0.2)),
    ],
)
def test_runs_are_those_of_the_main_job(method, run, monkeypatch):
    """The same weights, to the bit, as those of the other comparisons' runs."""
    models, init = [], Job.__init__
    monkeypatch.setattr(Job, "__init__", lambda self, *given: init(self, *given) or models.append(self.model))
    own = {"k": QUICK.k, "alpha": QUICK.alpha} if method == "lookbehind" else {}
    runs.perform(QUICK, runs.Run("final", method, 3, QUICK.lr, QUICK.epochs, rho=run.rho, **own))
    study.perform(QUICK, run)
    theirs, ours = models
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(p, q)


def minibatches(monkeypatch, run: Run) -> list[set[int]]:
    """The examples of each gradient of a run."""
    seen, loss = [], Job.loss
    monkeypatch.setattr(Job, "loss", lambda self, batch: seen.append({*batch.tolist()}) or loss(self, batch))
    study.perform(QUICK, run)
    monkeypatch.setattr(Job, "loss", loss)
    return seen


def test_gradients_are_those_that_the_table_counts(monkeypatch):
    """Of every kind, in gradients of a whole minibatch; and on the examples that its name says."""
    for way in study.ways(QUICK):
        of_rho = next(iter(way.runs(QUICK, "final").values()))
        seen = minibatches(monkeypatch, of_rho[0])
        count = sum(map(len, seen)) / QUICK.batch_size
        assert count == STEPS * of_rho[0].cost(QUICK), way
        pairs = list(zip(seen[::2], seen[1::2], strict=False))
        if way.kind == "other":
            assert all(len(a) == 16 and a.isdisjoint(b) for a, b in pairs)
        if way == Way("sam", 1 / 4):
            assert all(len(a) == 16 and a < b for a, b in pairs)


def test_halves_begin_and_end_as_they_say(monkeypatch):
    """A gradient a step where it is SGD's."""
    steps = {kind: [KINDS[kind].sharp(step, 4) for step in range(4)] for kind in KINDS}
    assert steps["early"] == steps["lookbehind-early"] == [True, True, False, False]
    assert steps["late"] == [False, False, True, True]
    assert steps["second"] == [True, False, True, False]
    assert steps["sgd"] == [False] * 4
    assert all(all(steps[kind]) for kind in ("sam", "free", "lookbehind", "other", "random"))


def test_weights_differ(monkeypatch):
    """Each control and each half trains something else than SAM and SGD."""
    models, init = [], Job.__init__
    monkeypatch.setattr(Job, "__init__", lambda self, *given: init(self, *given) or models.append(self.model))
    for kind in KINDS:
        study.perform(QUICK, Run("final", kind, 0, 0.25 if kind == "other" else 1.0, None if kind == "sgd" else 0.2))
    for a, b in itertools.combinations(models, 2):
        assert not torch.equal(a.stem.weight, b.stem.weight)


# ---- the report, from made-up numbers --------------------------------------------------------------------------------


def made_up(**accuracy: tuple[float, ...]) -> Report:
    """SHOWN's ways, all as accurate as 50 % but for the kinds that are named."""
    seeds = [0.5 + 0.01 * (seed % 2) for seed in SHOWN.seeds]
    of = {
        way: dict.fromkeys(way.runs(SHOWN, "final"), accuracy.get(way.kind, tuple(seeds))) for way in study.ways(SHOWN)
    }
    best = {way: None if way.kind == "sgd" else 0.2 for way in of}
    times = {SGD: Spread(1, 1, 1), SAM: Spread(1.9, 1.8, 2.0), Way("lookbehind"): Spread(2.8, 2.7, 2.9)}
    environment = {"commit": "c", "command": "m", "torch": "t", "python": "p", "processor": "x"}
    return Report(SHOWN, best, of, times, environment, "d" * 64)


def test_what_is_said():
    found = " ".join(report.conclusion(made_up(early=(0.8, 0.8, 0.81, 0.8, 0.8), late=(0.6, 0.6, 0.61, 0.6, 0.6))))
    early, late = "SAM in the first half, then SGD", "SGD in the first half, then SAM"
    assert f"{early} is more accurate than {late}: +20.0 (+20.0 to +20.0) points, with as many gradients." in found
    assert f"{early} is more accurate than SAM: " in found
    assert "with 0.75 times its gradients" in found
    assert "SAM is not told apart from SGD: +0.0 (+0.0 to +0.0) points, with 2 times its gradients." in found
    assert f"{late} is less" not in found


def test_the_rule_compares_a_fraction_at_larger_rhos():
    """A quarter at twice the rho, a sixteenth at four times; a half has no rho of the grid."""
    found, shift = made_up(), dict(zip(SHOWN.rhos, range(6), strict=True))
    for way in (SAM, Way("sam", 1 / 4), Way("sam", 1 / 16)):
        for rho in SHOWN.rhos:
            found.accuracy[way][rho] = tuple(0.01 * shift[rho] + x for x in (0.5, 0.51, 0.52, 0.53, 0.54))
    rows = {row[0]: row[1:] for row in report.rule_rows(found)}
    assert list(rows) == ["1/4 at 2 rho", "1/16 at 4 rho"]
    assert [cell[:4] for cell in rows["1/4 at 2 rho"]] == ["+1.0"] * 5 + [""]
    assert [cell[:4] for cell in rows["1/16 at 4 rho"]] == ["+2.0"] * 4 + [""] * 2


def test_times_of_halves_are_reckoned():
    times = made_up().times
    assert study.relative_time(SHOWN, Way("second"), times) == pytest.approx(1.45)
    assert study.relative_time(SHOWN, Way("lookbehind-early"), times) == pytest.approx(1.9)
    assert study.relative_time(SHOWN, Way("sgd", longer=2.0), times) == pytest.approx(2)
    assert study.relative_time(SHOWN, Way("random"), times) is None


def test_mistakes(tmp_path, capfd, whole):
    file = tmp_path / "file"
    file.touch()
    assert "not a folder" in refused(capfd, "--quick", "--output", str(file))
    assert "--jobs" in refused(capfd, "--jobs", "0")
    assert "begun with" in refused(capfd, "--output", str(whole))
