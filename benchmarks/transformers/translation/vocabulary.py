"""Sentences as numbers: byte-pair encoding, one vocabulary for both languages."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

PAD, BEGIN, END = 0, 1, 2
SPECIAL = ["<pad>", "<begin>", "<end>"]


class Vocabulary:
    """Byte-pair encoding over bytes (Sennrich et al. 2016; the library is `tokenizers`), so that nothing is unknown."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def learn(cls, sentences: Iterable[str], size: int) -> "Vocabulary":
        """At most `size` entries, the three special ones among them. The same sentences give the same vocabulary."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would outlive a fork, and are not worth it here
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=SPECIAL,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(sentences, trainer)
        return cls(tokenizer)

    def __len__(self) -> int:
        """How many entries there are."""
        return self._tokenizer.get_vocab_size()

    def to_json(self) -> str:
        """All of it, in the library's form."""
        return self._tokenizer.to_str()

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Numbers, with END after each sentence."""
        return [[*encoding.ids, END] for encoding in self._tokenizer.encode_batch(list(sentences))]

    def decode(self, sentences: Iterable[Sequence[int]]) -> list[str]:
        """Back to text, up to END."""
        return [text.strip() for text in self._tokenizer.decode_batch([_until_end(ids) for ids in sentences])]


def _until_end(ids: Sequence[int]) -> list[int]:
    ids = list(ids)
    return ids[: ids.index(END)] if END in ids else ids
