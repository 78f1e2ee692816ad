"""The encoder-decoder, and its translations."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.transformers.translation.vocabulary import BEGIN, END, PAD


class Translator(nn.Module):
    """A Transformer (Vaswani et al. 2017) with LayerNorm before each block and one embedding for source, target and
    output.

    Args:
        vocabulary: how many entries there are.
        width: of a token's vector; a multiple of `heads`.
        depth: layers of the encoder, and as many of the decoder.
        heads: of every attention.
        dropout: a probability, at the embeddings. The layers have none: on CPUs its masks are half of an evaluation.
    """

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        shape = {"d_model": width, "nhead": heads, "dim_feedforward": 2 * width, "dropout": 0.0}
        how = {"batch_first": True, "norm_first": True}
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**shape, **how), depth, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**shape, **how), depth, nn.LayerNorm(width))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Numbers (N, S) and (N, T), int64, padded with PAD behind, to logits (N, T, vocabulary) of what follows each
        entry of `target`.
        """
        return self.decode(self.encode(source), source, target)

    def encode(self, source: Tensor) -> Tensor:
        """(N, S) to (N, S, width)."""
        return self.encoder(self._embed(source), src_key_padding_mask=source == PAD)

    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """What was encoded, its source, and the target so far, to logits (N, T, vocabulary)."""
        length = target.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        hidden = self.decoder(
            self._embed(target), memory, tgt_mask=later, tgt_is_causal=True, memory_key_padding_mask=source == PAD
        )
        return hidden @ self.embedding.weight.T

    def _embed(self, ids: Tensor) -> Tensor:
        """Embeddings, scaled, with the sines of their places (Vaswani et al. 2017, section 3.5)."""
        width = self.embedding.embedding_dim
        place = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)[:, None]
        rate = torch.exp(torch.arange(0, width, 2, device=ids.device, dtype=torch.float32) * (-math.log(10000) / width))
        angle = place * rate
        positions = torch.stack([angle.sin(), angle.cos()], 2).flatten(1)
        return self.dropout(self.embedding(ids) * math.sqrt(width) + positions)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(N, the longest), int64."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])


def loss(model: Translator, source: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Mean cross entropy over the entries of `target`, END included, with label smoothing (Szegedy et al. 2016);
    0-dim, nats.
    """
    logits = model(source, F.pad(target[:, :-1], (1, 0), value=BEGIN))
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, label_smoothing=smoothing)


@torch.no_grad()
def translate(model: Translator, source: Tensor) -> list[list[int]]:
    """The greedy translation of each row of `source`, in evaluation mode: the likeliest entry each time, up to END or
    to half as many again and ten entries.
    """
    training = model.training
    model.eval()
    memory = model.encode(source)
    target = torch.full((len(source), 1), BEGIN, device=source.device)
    ended = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    for _ in range(source.shape[1] * 3 // 2 + 10):
        following = model.decode(memory, source, target)[:, -1].argmax(1)
        target = torch.cat([target, following.where(~ended, PAD)[:, None]], 1)
        ended |= following == END
        if ended.all():
            break
    model.train(training)
    return [row[: row.index(END)] if END in row else row for row in target[:, 1:].tolist()]
