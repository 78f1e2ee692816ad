"""The encoder-decoder, its minibatches, and a whole quick translation job."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.transformers.plan import Run
from benchmarks.transformers.training import train
from benchmarks.transformers.translation import __main__ as command
from benchmarks.transformers.translation import job, model
from benchmarks.transformers.translation.job import QUICK, Translation
from benchmarks.transformers.translation.model import Translator
from benchmarks.transformers.translation.vocabulary import BEGIN, END, PAD, Vocabulary
from tests.benchmarks.transformers import catalogues

SOURCE = [[5, 6, 7, 8, END], [9, 5, END]]
TARGET = [[4, 8, END], [6, 7, 9, 4, END]]


@pytest.fixture
def translator() -> Translator:
    return Translator(vocabulary=12, width=8, depth=2, heads=2, dropout=0.0)


# The model


def test_padding_changes_nothing(translator):
    together = translator(model.padded(SOURCE), model.padded(TARGET))
    for row, (source, target) in enumerate(zip(SOURCE, TARGET, strict=True)):
        alone = translator(torch.tensor([source]), torch.tensor([target]))
        torch.testing.assert_close(together[row, : len(target)], alone[0], rtol=0, atol=1e-5)  # float32, other sums


def test_what_follows_is_not_seen(translator):
    source, target = model.padded(SOURCE), model.padded(TARGET)
    logits = translator(source, target)
    other = target.clone()
    other[:, 2] = 3
    changed = translator(source, other)
    torch.testing.assert_close(changed[:, :2], logits[:, :2], rtol=0, atol=1e-6)
    assert (changed[:, 2:] - logits[:, 2:]).abs().amax((1, 2)).min() > 1e-3


def test_the_loss_is_the_smoothed_cross_entropy(translator):
    """By its definition, entry by entry: the label has 1 - 0.1, all entries share 0.1."""
    total, entries = 0.0, 0
    for source, target in zip(SOURCE, TARGET, strict=True):
        logits = translator(torch.tensor([source]), torch.tensor([[BEGIN, *target[:-1]]]))[0].double()
        for row, label in zip(logits.log_softmax(1), target, strict=True):
            total -= (0.9 * row[label] + 0.1 * row.mean()).item()
            entries += 1
    loss = model.loss(translator, model.padded(SOURCE), model.padded(TARGET), smoothing=0.1)
    assert loss.item() == pytest.approx(total / entries, rel=1e-5)


def test_translations_are_the_likeliest_entries_one_by_one(translator):
    translator.train()
    found = model.translate(translator, model.padded(SOURCE))
    assert translator.training
    translator.eval()
    for source, translation in zip(SOURCE, found, strict=True):
        target = [BEGIN]
        while len(target) <= 5 * 3 // 2 + 10:
            following = translator(torch.tensor([source]), torch.tensor([target]))[0, -1].argmax().item()
            if following == END:
                break
            target.append(following)
        assert translation == target[1:]


# With the packages


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    for name in ("polib", "sacrebleu", "tokenizers"):
        pytest.importorskip(name, reason=f"{name} is not installed: make translation-tests")
    path = tmp_path_factory.getbasetemp() / "catalogues"  # one, for the data is read once in a process
    return path if path.exists() else catalogues.write(path)


def test_the_vocabulary_forgets_nothing(folder):
    sentences = [side for pair in catalogues.SENTENCES for side in pair]
    vocabulary = Vocabulary.learn(sentences, 300)
    assert 259 < len(vocabulary) <= 300
    assert Vocabulary.learn(sentences, 300).to_json() == vocabulary.to_json()
    encoded = vocabulary.encode([*sentences, "Größe: 日本 „x“ & 5 €"])
    assert all(ids[-1] == END and ids.count(END) == 1 and PAD not in ids for ids in encoded)
    assert vocabulary.decode(encoded) == [*sentences, "Größe: 日本 „x“ & 5 €"]
    assert len(encoded[0]) < len(sentences[0].encode()), "pairs are merged"


def test_minibatches_are_of_like_length_and_within_the_limit(folder):
    study = Translation(QUICK, str(folder))
    task = study.task(Run("tune", "base", 5, lr=0.1), folder)
    source, target = study.prepared().source, study.prepared().target
    first, second = task.batches(0), task.batches(1)
    for batches in (first, second):
        assert sorted(row for rows in batches for row in rows) == list(range(len(source)))
        for rows in batches:
            width = max(len(source[row]) for row in rows) + max(len(target[row]) for row in rows)
            assert width * len(rows) <= QUICK.tokens
    assert first != second
    assert len(first) == len(second)
    assert task.batches(0) == first
    assert study.task(Run("tune", "base", 6, lr=0.1), folder).batches(0) != first
    assert task.minibatches == QUICK.epochs * len(first)
    spread = [len(target[row]) for rows in first for row in rows]
    within = sum(max(n := [len(target[row]) for row in rows]) - min(n) for rows in first) / len(first)
    assert within < (max(spread) - min(spread)) / 2


def test_bleu_is_that_of_a_perfect_and_of_a_copied_translation(folder):
    study = Translation(QUICK, str(folder))
    pairs = study.prepared().corpus.test
    assert job.bleu([english for _, english in pairs], pairs) == pytest.approx(100)
    assert study.references() == {"the source copied": pytest.approx(0, abs=10)}


def test_it_learns_to_translate(folder):
    """What it was trained on, at last: a mistake in masks, shifts or decoding would show."""
    settings = replace(QUICK, width=32, vocabulary=400, epochs=150, dropout=0.0, checkpoint_every=10_000, limit=16)
    study = Translation(settings, str(folder))
    run = Run("tune", "base", 0, lr=1e-2)
    task = study.task(run, folder)
    train(task, run, settings)
    pairs = study.prepared().corpus.train
    found = task.translations([german for german, _ in pairs])
    right = sum(ours == english for ours, (_, english) in zip(found, pairs, strict=True))
    assert right >= len(pairs) * 3 // 4, found


def test_the_schedule_rises_and_falls():
    prepared = job.Prepared(None, [0] * 300, [[5, END]] * 9, [[6, END]] * 9)
    task = job.TranslationTask(QUICK, prepared, 0, 1)
    factors = [task.schedule(step / 100) for step in range(100)]
    assert 0 < factors[0] < 0.05
    assert factors.index(max(factors)) == 10
    assert factors[10] == pytest.approx(1)
    assert factors[55] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(1 / 90)


def test_what_is_not_installed_is_said(monkeypatch, capfd, tmp_path):
    monkeypatch.setitem(sys.modules, "polib", None)
    assert command.main(["--quick", "--output", str(tmp_path / "runs")]) == 2
    assert "polib is not installed: pip install 'lookbehind-fused[translation]'" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_whole_quick_job(folder, tmp_path, capfd):
    """Every row, with 2k gradients for k minibatches, and the report that the numbers give."""
    argv = ["--quick", "--data-dir", str(folder), "--jobs", "1", "--output", str(tmp_path)]
    assert command.main(argv) == 0
    output = capfd.readouterr()
    assert "gradient evaluations are to be done" in output.err
    assert output.out.startswith("method ")
    content = json.loads((tmp_path / "translation.json").read_text())
    rows = content["rows"]
    study = Translation(QUICK, str(folder))
    minibatches = study.task(Run("tune", "base", 0, lr=0.1), folder).minibatches
    assert minibatches % 2 == 0
    for key, row in rows.items():
        times = 1 if key == "base" else 2
        assert [result["evaluations"] for result in row["runs"]] == [times * minibatches] * 2
        assert [result["run"]["seed"] for result in row["runs"]] == [0, 1]
        assert all(0 <= result["score"] <= 100 and math.isfinite(result["loss"]) for result in row["runs"])
        assert [result["alpha"] is not None for result in row["runs"]] == [key.startswith(("look", "adapt"))] * 2
    assert content["data"] == study.fingerprint()
    page = (tmp_path / "README.md").read_text()
    assert f"the source copied {content['references']['the source copied']:.1f}" in page
    assert "Mordido et al. 2024, Table 4" in page
    assert (tmp_path / "translation.png").stat().st_size > 10_000
