"""The vision transformer, its halves of the classes, and a whole quick job: written, resumed, refused."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from benchmarks import data, workers
from benchmarks.files import UserError
from benchmarks.paired import Interval
from benchmarks.store import Store
from benchmarks.transformers import study as studies
from benchmarks.transformers.plan import Run
from benchmarks.transformers.vit import __main__ as command
from benchmarks.transformers.vit.job import PRETRAINED, QUICK, Vit, accuracy
from benchmarks.transformers.vit.model import VisionTransformer

pytestmark = pytest.mark.xdist_group("vit")  # one quick job serves all tests of this file
ROOT = Path(__file__).parents[3]
ROWS = ("base", "longer", "sam", "asam", "lookbehind-sam", "adaptive-sam", "lookbehind-asam", "adaptive-asam")
EVALUATIONS = dict(zip(ROWS, (1, 3, 2, 2, 3, 3, 3, 3), strict=True))
"""Of each row, in units of the base's."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "vit"
    assert command.main(["--quick", "--jobs", "1", "--output", str(folder)]) == 0
    return folder


def results_of(folder: Path) -> dict[str, dict]:
    """Every result in the folder, without the time that it took."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*-*.json")}
    for result in found.values():
        assert result.pop("seconds") > 0
    return found


def test_the_rows_are_what_the_runs_gave(whole):
    content = json.loads((whole / "vit.json").read_text())
    assert tuple(content["rows"]) == ROWS
    results = results_of(whole)
    minibatches = QUICK.epochs * (QUICK.training // QUICK.batch_size)
    for key, row in content["rows"].items():
        assert len(row["runs"]) == 2
        for result in row["runs"]:
            assert result["evaluations"] == EVALUATIONS[key] * minibatches
            assert results[Run(**result["run"]).name]["score"] == result["score"]
    for found in content["differences"]:
        first, second = (
            [100 * result["score"] for result in content["rows"][found[side]]["runs"]] for side in ("first", "second")
        )
        differences = [x - y for x, y in zip(first, second, strict=True)]
        assert found["differences"] == pytest.approx(differences)
        assert found["mean"] == pytest.approx(statistics.fmean(differences))
    assert content["settings"]["seeds"] == [0, 1]
    assert content["environment"]["torch"] == torch.__version__
    assert not list(whole.glob("*-*.pt")), "finished runs need no checkpoint"


def test_the_page_says_what_the_numbers_say(whole):
    content, page = json.loads((whole / "vit.json").read_text()), (whole / "README.md").read_text()
    for row in content["rows"].values():
        scores = [100 * result["score"] for result in row["runs"]]
        interval = Interval.of(scores)
        line = next(line for line in page.splitlines() if line.startswith(f"| {row['label']} |"))
        assert f"| {row['runs'][0]['evaluations']:,} |" in line
        assert f"| {interval.mean:.1f} | {interval.low:.1f} to {interval.high:.1f} |" in line
    for found in content["differences"]:
        asked = " above ".join(content["rows"][found[side]]["label"] for side in ("first", "second"))
        line = next(line for line in page.splitlines() if line.startswith(f"| {asked} |"))
        assert f"| {found['verdict']}" in line
        assert f"{found['mean']:+.2f} ({found['interval'][0]:+.2f} to {found['interval'][1]:+.2f})" in line
    for name, value in content["chosen"]["lookbehind-asam"].items():
        assert f"{name} {value:g}" in page
    assert "Made by `python -m benchmarks.transformers.vit --quick`." in page
    assert str(whole.parent) not in page + (whole / "vit.json").read_text(), "where its files were is nobody's business"
    picture = imread(whole / "vit.png")[..., :3]
    assert 0.005 < (picture.min(axis=2) < 0.9).mean() < 0.5


def test_a_second_start_runs_nothing_and_repeats_the_table(whole, capfd, monkeypatch):
    before = {path.name: path.read_bytes() for path in whole.iterdir() if path.name != "vit.json"}
    monkeypatch.setattr(workers, "run_missing", None)  # nothing may be run
    assert command.main(["--quick", "--jobs", "1", "--output", str(whole)]) == 0
    assert capfd.readouterr().out.startswith("method ")
    after = {path.name: path.read_bytes() for path in whole.iterdir() if path.name != "vit.json"}
    assert before == after


@pytest.mark.parametrize("option", ["--output", "--results"])
def test_a_file_is_no_folder(option, capfd):
    assert command.main(["--quick", option, os.devnull]) == 2
    assert f"{option} {os.devnull}: not a folder" in capfd.readouterr().err


def test_a_folder_of_other_settings_or_data_is_refused(whole, capfd):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert command.main(["--quick", "--seeds", "3", "--output", str(whole)]) == 2
    assert "begun with seeds [0, 1], not [0, 1, 2]; name another --output" in capfd.readouterr().err
    settings = json.loads(before["settings.json"]) | {"data": "other"}
    (whole / "settings.json").write_text(json.dumps(settings))
    try:
        assert command.main(["--quick", "--output", str(whole)]) == 2
    finally:
        (whole / "settings.json").write_bytes(before["settings.json"])
    assert "begun on other data than there is now" in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_a_run_gives_the_same_numbers_again(whole):
    name, result = next(item for item in results_of(whole).items() if item[0].startswith("final-lookbehind-adaptive"))
    again = dict(studies.perform(Vit(QUICK), whole, Run(**result["run"])))
    again.pop("seconds")
    (whole / f"{name}.pt").unlink()
    assert again == result


def test_the_estimate_counts_what_will_be_evaluated(whole, tmp_path, capfd, monkeypatch):
    """Of a new folder, everything; of one whose last run is missing, that run."""
    monkeypatch.setattr(workers, "run_missing", lambda *_: None)
    study = Vit(QUICK)
    settings = studies.plain_settings(study)
    studies.run_all(study, Store(tmp_path / "new", settings, study.fingerprint(), Run, "score"), jobs=2)
    minibatches = QUICK.epochs * (QUICK.training // QUICK.batch_size)
    results = results_of(whole)
    planned = sum(result["evaluations"] for result in results.values())
    pretraining = QUICK.pretraining_epochs * (QUICK.pretraining // QUICK.batch_size)
    said = capfd.readouterr().err
    assert f"vit: {planned + pretraining:,} gradient evaluations are to be done" in said
    assert "minutes on 2 idle cores" in said
    folder = Store(whole, settings, study.fingerprint(), Run, "score")
    del folder.done[next(name for name in folder.done if "adaptive" in name)]
    studies.run_all(study, folder, jobs=1)
    assert f"vit: {3 * minibatches} gradient evaluations are to be done" in capfd.readouterr().err


def test_the_pretrained_weights_are_what_runs_begin_with(whole):
    weights = torch.load(whole / PRETRAINED, weights_only=True)["weights"]
    study = Vit(QUICK)
    tasks = [study.task(Run("final", "base", seed, lr=0.1), whole) for seed in (0, 0, 1)]
    states = [task.model.state_dict() for task in tasks]
    for name, tensor in weights.items():
        if name.startswith("head."):
            assert states[0][name].shape[0] == len(QUICK.classes)
        else:
            assert all(torch.equal(state[name], tensor) for state in states)
    assert torch.equal(states[0]["head.weight"], states[1]["head.weight"])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])
    assert not torch.equal(states[0]["head.weight"], weights["head.weight"])


def test_the_halves_share_no_class():
    before, after = Vit(QUICK).halves()
    images = data.load("digits")
    assert len(before.train_labels) + len(after.train_labels) == len(images.train_labels)
    assert len(before.test_labels) + len(after.test_labels) == len(images.test_labels)
    chosen = [label in QUICK.classes for label in images.test_labels.tolist()]
    assert torch.equal(after.test_images, images.test_images[chosen])
    expected = [QUICK.classes.index(label) for label in images.test_labels.tolist() if label in QUICK.classes]
    assert after.test_labels.tolist() == expected
    assert set(before.train_labels.tolist()) == set(range(5))


def test_validation_images_are_not_trained_on_and_test_images_not_tuned_by(whole):
    study = Vit(QUICK)
    half = study.halves()[1]
    task = study.task(Run("tune", "base", 100, lr=0.1), whole)
    assert torch.equal(task._images, half.train_images[: QUICK.training])
    seen = (
        half.train_images[QUICK.training :][: QUICK.validation],
        half.train_labels[QUICK.training :][: QUICK.validation],
    )
    assert study.score(task, Run("tune", "base", 100, lr=0.1)) == accuracy(task.model, *seen)
    test = accuracy(task.model, half.test_images, half.test_labels)
    assert study.score(task, Run("final", "base", 0, lr=0.1)) == test


def test_more_images_than_there_are_is_an_error():
    with pytest.raises(UserError, match="fine-tuning: expected at least 1064 images, got 6"):
        Vit(replace(QUICK, training=1000))


def test_a_patch_is_seen_where_it_is():
    """One pixel reaches the logits through its own patch; exchanging two patches shows, for they have positions."""
    network = VisionTransformer(1, 8, 2, classes=3, width=8, depth=1, heads=2)
    images = torch.randn(2, 1, 8, 8)
    logits = network(images)
    assert logits.shape == (2, 3)
    tokens = network.patches(images).flatten(2).transpose(1, 2)
    moved = images.clone()
    moved[:, :, 2, 4] += 1
    changed = (network.patches(moved).flatten(2).transpose(1, 2) - tokens).abs().amax(2)
    assert (changed > 0).nonzero()[:, 1].tolist() == [6, 6]  # row 1, column 2 of 4
    exchanged = images.clone()
    exchanged[:, :, :2, :2], exchanged[:, :, 2:4, :2] = images[:, :, 2:4, :2], images[:, :, :2, :2]
    assert (network(exchanged) - logits).abs().max() > 1e-4


@pytest.mark.slow
def test_a_killed_job_goes_on_to_the_same_results(whole, tmp_path):
    """Killed in a run, interrupted as by Ctrl-C in a later one."""
    folder = tmp_path / "vit"
    argv = [sys.executable, "-m", "benchmarks.transformers.vit", "--quick", "--jobs", "1", "--output", str(folder)]
    for count, sign in ((2, signal.SIGKILL), (9, signal.SIGINT)):
        process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
        while len(list(folder.glob("*-*.json"))) < count:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.killpg(process.pid, sign)
        said = process.communicate()[1]
        assert process.returncode == (-9 if sign == signal.SIGKILL else 130)
    assert said.endswith("interrupted; the same command goes on from the last checkpoints\n")
    assert command.main(["--quick", "--jobs", "1", "--output", str(folder)]) == 0
    assert results_of(folder) == results_of(whole)
