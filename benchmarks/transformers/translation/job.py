"""The translation job: settings, data as minibatches, BLEU."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Adam

from benchmarks.files import UserError
from benchmarks.transformers.plan import Run, Settings
from benchmarks.transformers.study import Study
from benchmarks.transformers.translation import corpus, model
from benchmarks.transformers.translation.corpus import Corpus, Pair
from benchmarks.transformers.translation.vocabulary import Vocabulary


@dataclass(frozen=True)
class TranslationSettings(Settings):
    """What is translation's own."""

    data: str = "messages"
    """`messages` or `iwslt14`."""
    limit: int | None = None
    """Pairs of each part, the first ones."""
    vocabulary: int = 2000
    width: int = 96
    depth: int = 2
    heads: int = 4
    dropout: float = 0.1
    smoothing: float = 0.1
    epochs: int = 5
    tokens: int = 2000
    """Of a minibatch at most, source and target, with what they are padded with."""
    warmup: float = 0.1
    """Fraction of the training in which the learning rate rises; then it falls, both linearly."""


DEFAULT = TranslationSettings(
    seeds=(0, 1, 2),
    tuning_seeds=(100,),
    learning_rates=(2e-3, 4e-3),
    sam_rhos=(0.02, 0.05, 0.1),
    asam_rhos=(0.1, 0.2, 0.5),
    ks=(2,),
    alphas=(0.8,),
    switch=True,
    checkpoint_every=100,
)
QUICK = TranslationSettings(
    seeds=(0, 1),
    tuning_seeds=(100,),
    learning_rates=(2e-3, 5e-3),
    sam_rhos=(0.05,),
    asam_rhos=(0.2,),
    ks=(2,),
    alphas=(0.8,),
    switch=True,
    checkpoint_every=2,
    limit=40,
    vocabulary=300,
    width=16,
    depth=1,
    heads=2,
    epochs=2,
    tokens=400,
)


class Translation(Study):
    """German to English, BLEU.

    Args:
        settings: of the job.
        folder: of the data, None for the default one.

    Raises UserError for data, or packages, that are not there.
    """

    name = "translation"
    title = "Translation, German to English"
    base = "Adam"
    measure = "BLEU"
    unit = "BLEU"
    scale = 1.0
    claim: ClassVar[str] = """
        with an encoder-decoder over Adam and a minibatch of its own for each inner step (k = 2, alpha 0.8 or adaptive),
        Lookbehind on top of SAM and ASAM has a higher BLEU than SAM and ASAM (Mordido et al. 2024, Table 4)."""

    def __init__(self, settings: TranslationSettings, folder: str | None = None) -> None:
        try:
            import polib  # noqa: F401
            import sacrebleu  # noqa: F401
            import tokenizers  # noqa: F401
        except ImportError as error:
            raise UserError(f"{error.name} is not installed: pip install 'lookbehind-fused[translation]'") from error
        self.settings = settings
        self.folder = folder
        self.prepared()

    def prepared(self) -> "Prepared":
        """The data, read once in a process."""
        return _prepared(self.settings.data, self.folder, self.settings.limit, self.settings.vocabulary)

    def fingerprint(self) -> str:
        """Of all pairs and of the vocabulary that they gave."""
        found = self.prepared()
        return hashlib.sha256((found.corpus.fingerprint() + found.vocabulary.to_json()).encode()).hexdigest()

    def trial(self) -> "TranslationTask":
        """See Study."""
        return TranslationTask(self.settings, self.prepared(), 0, 1)

    def task(self, run: Run, folder: Path) -> "TranslationTask":
        """See Study."""
        return TranslationTask(self.settings, self.prepared(), run.seed, run.times)

    def score(self, task: "TranslationTask", run: Run) -> float:
        """BLEU (Papineni et al. 2002, as sacrebleu computes it by default) of greedy translations."""
        pairs = self.prepared().corpus.test if run.purpose == "final" else self.prepared().corpus.valid
        return bleu(task.translations([german for german, _ in pairs]), pairs)

    def references(self) -> dict[str, float]:
        """What the German itself is worth as its translation."""
        pairs = self.prepared().corpus.test
        return {"the source copied": bleu([german for german, _ in pairs], pairs)}

    def setting(self) -> str:
        """See Study."""
        import sacrebleu
        import tokenizers

        s, pairs = self.settings, self.prepared().corpus
        task = self.trial()
        source = {
            "messages": "German and English messages of the programs in Debian's libreoffice-l10n-de",
            "iwslt14": "IWSLT'14, German and English",
        }[s.data]
        words = sum(len(english.split()) for _, english in pairs.train)
        parameters = sum(p.numel() for p in task.model.parameters())
        return f"""
            {source}: {len(pairs.train):,} pairs to train with ({words:,} English words), {len(pairs.valid):,} to
            validate, {len(pairs.test):,} to test, split by a hash, with what differs in nothing but case, digits and
            punctuation on one side only. A Transformer of width {s.width}, {s.depth} + {s.depth} layers,
            {parameters:,} parameters, {len(self.prepared().vocabulary):,} byte pairs, dropout {s.dropout:g} at the
            embeddings, label smoothing {s.smoothing:g}; {task.minibatches:,} minibatches ({s.epochs} epochs) of at most
            {s.tokens:,}
            entries and of like length; Adam with betas 0.9 and 0.98, the learning rate rising over the first
            {s.warmup:.0%} and then falling to 0, both linearly. Every inner step of Lookbehind has a minibatch of its
            own: 2k gradients for k minibatches, as many for each as SAM has. Greedy decoding; BLEU by sacrebleu
            {sacrebleu.__version__}, byte pairs by tokenizers {tokenizers.__version__}.
        """


def bleu(translations: Sequence[str], pairs: Sequence[Pair]) -> float:
    """Of a whole corpus, from 0 to 100."""
    import sacrebleu

    return sacrebleu.corpus_bleu(translations, [[english for _, english in pairs]]).score


@dataclass(frozen=True)
class Prepared:
    """The corpus, its vocabulary, and the pairs to train with as numbers."""

    corpus: Corpus
    vocabulary: Vocabulary
    source: list[list[int]]
    target: list[list[int]]


@lru_cache(maxsize=1)
def _prepared(name: str, folder: str | None, limit: int | None, size: int) -> Prepared:
    pairs = corpus.load(name, folder, limit)
    vocabulary = Vocabulary.learn([side for pair in pairs.train for side in pair], size)
    source, target = (vocabulary.encode([pair[side] for pair in pairs.train]) for side in (0, 1))
    return Prepared(pairs, vocabulary, source, target)


class TranslationTask:
    """See Task."""

    def __init__(self, settings: TranslationSettings, prepared: Prepared, seed: int, times: int) -> None:
        self._settings, self._data, self._seed = settings, prepared, seed
        self._order: tuple[int, list[list[int]]] = (-1, [])  # an epoch and its minibatches
        torch.manual_seed(seed)
        self.model = model.Translator(
            len(prepared.vocabulary), settings.width, settings.depth, settings.heads, settings.dropout
        )
        self._each = len(self.batches(0))
        self.minibatches = self._each * settings.epochs * times

    def loss(self, number: int) -> Tensor:
        """See Task."""
        epoch, place = divmod(number, self._each)
        if epoch != self._order[0]:
            self._order = epoch, self.batches(epoch)
        rows = self._order[1][place]
        source, target = (model.padded([side[row] for row in rows]) for side in (self._data.source, self._data.target))
        return model.loss(self.model, source, target, self._settings.smoothing)

    def base(self, lr: float) -> Adam:
        """See Task."""
        return Adam(self.model.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-9)

    def schedule(self, fraction: float) -> float:
        """See Task."""
        warmup = self._settings.warmup
        return min((fraction + 1e-3) / warmup, (1 - fraction) / (1 - warmup))  # not 0 at the first step

    def batches(self, epoch: int) -> list[list[int]]:
        """Every pair once: pairs of like length together, in an order that follows from seed and epoch.

        How many minibatches there are follows from the lengths alone.
        """
        source, target = self._data.source, self._data.target
        order = random.Random(f"{self._seed}/{epoch}")
        rows = list(range(len(source)))
        order.shuffle(rows)
        rows.sort(key=lambda row: (len(target[row]), len(source[row])))
        found: list[list[int]] = [[]]
        longest = [0, 0]
        for row in rows:
            longest = [max(longest[0], len(source[row])), max(longest[1], len(target[row]))]
            if found[-1] and sum(longest) * (len(found[-1]) + 1) > self._settings.tokens:
                found.append([])
                longest = [len(source[row]), len(target[row])]
            found[-1].append(row)
        order.shuffle(found)
        return found

    def translations(self, sentences: Sequence[str], size: int = 64) -> list[str]:
        """Greedy ones, in the order of the sentences."""
        source = self._data.vocabulary.encode(sentences)
        rows = sorted(range(len(source)), key=lambda row: len(source[row]))
        found = [""] * len(rows)
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            ids = model.translate(self.model, model.padded([source[row] for row in some]))
            for row, text in zip(some, self._data.vocabulary.decode(ids), strict=True):
                found[row] = text
        return found
