"""Parts of minibatches as loaders give them."""

import re
from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset

from lookbehind_fused.program import Evaluation

QUARTER = Evaluation(0, 1, False, ascends=True, fraction=0.25)
SECOND_HALF = Evaluation(0, 1, False, ascends=True, microbatch=1, microbatches=2)
WHOLE = Evaluation(0, 1, False, ascends=True)
X, Y = torch.arange(24).view(8, 3), torch.arange(8) + 100
Pair = namedtuple("Pair", "x y")  # what torch's own collections are

# a batch, what a quarter of it is, and its second half
BATCHES: dict[str, tuple[Any, Any, Any]] = {
    "tensor": (X, X[:2], X[4:]),
    "tuple": ((X, Y), (X[:2], Y[:2]), (X[4:], Y[4:])),
    "list": ([X, Y], [X[:2], Y[:2]], [X[4:], Y[4:]]),
    "namedtuple": (Pair(X, Y), Pair(X[:2], Y[:2]), Pair(X[4:], Y[4:])),
    "mapping": ({"x": X, "y": Y}, {"x": X[:2], "y": Y[:2]}, {"x": X[4:], "y": Y[4:]}),
    "what is like one": (UserDict(x=X), UserDict(x=X[:2]), UserDict(x=X[4:])),
    "read-only mapping": (MappingProxyType({"x": X}), {"x": X[:2]}, {"x": X[4:]}),
    "in each other": (
        ({"ids": X, "more": [Y, {"deep": Y}]}, Y),
        ({"ids": X[:2], "more": [Y[:2], {"deep": Y[:2]}]}, Y[:2]),
        ({"ids": X[4:], "more": [Y[4:], {"deep": Y[4:]}]}, Y[4:]),
    ),
    "plain values": (
        {"x": X, "return_loss": True, "count": torch.tensor(8), "mask": None, "text": list("abcdefgh")},
        {"x": X[:2], "return_loss": True, "count": torch.tensor(8), "mask": None, "text": ["a", "b"]},
        {"x": X[4:], "return_loss": True, "count": torch.tensor(8), "mask": None, "text": list("efgh")},
    ),
    "array": (Y.numpy(), Y[:2].numpy(), Y[4:].numpy()),
    "texts": (list("abcdefgh"), ["a", "b"], list("efgh")),
}


def same(a: Any, b: Any) -> bool:
    """Of the same kinds, with the same numbers."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (dict, UserDict)):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(torch.as_tensor(a == b).all()) and getattr(a, "shape", None) == getattr(b, "shape", None)


@pytest.mark.parametrize("what", BATCHES)
def test_parts_of_whatever_a_loader_gives(what: str) -> None:
    batch, quarter, half = BATCHES[what]
    assert same(QUARTER.part(batch), quarter)
    assert same(SECOND_HALF.part(batch), half)
    assert WHOLE.part(batch) is batch


def test_the_batch_itself_is_left_alone() -> None:
    ordered = OrderedDict(x=X, y=[Y])
    part = QUARTER.part(ordered)
    assert type(part) is OrderedDict
    assert ordered["x"] is X
    assert ordered["y"][0] is Y
    assert part["x"].data_ptr() == X.data_ptr(), "a view, not a copy"


class Rows(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": X[i], "label": int(Y[i]), "name": str(i), "size": (1, 2)}


def test_what_torch_collates() -> None:
    """Its default makes a list of what a tuple was, and a list of texts."""
    (batch,) = DataLoader(Rows(), batch_size=8)
    part = SECOND_HALF.part(batch)
    assert torch.equal(part["x"], X[4:])
    assert part["label"].tolist() == [104, 105, 106, 107]
    assert part["name"] == ["4", "5", "6", "7"]
    assert [column.tolist() for column in part["size"]] == [[1] * 4, [2] * 4]


@pytest.mark.parametrize("evaluation", [QUARTER, SECOND_HALF])
@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        ((X, Y[:4]), ValueError, "as many examples along the first dimension of everything in it, got 4 and 8"),
        ({"x": X, "size": [28, 28]}, ValueError, "got 2 and 8; give evaluation.part() what has an entry for each"),
        ({}, ValueError, "expected a tensor with the examples along its first dimension, got {}"),
        ((), ValueError, "expected a tensor with the examples along its first dimension, got ()"),
        (torch.tensor(3.0), ValueError, "the examples along its first dimension, got a tensor of shape ()"),
        (None, ValueError, "expected a tensor with the examples along its first dimension, got None"),
        ("text", ValueError, "expected a tensor with the examples along its first dimension, got 'text'"),
        ((X, object), TypeError, "expected tensors, and tuples, lists or mappings of them, got <class 'object'>"),
        ({"x": {X[0]}}, TypeError, "expected tensors, and tuples, lists or mappings of them, got {tensor"),
        (pack_sequence([X[0], X[1]]), TypeError, "got a PackedSequence"),
    ],
)
def test_what_is_refused(evaluation: Evaluation, batch: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^batch: .*{re.escape(words)}"):
        evaluation.part(batch)
