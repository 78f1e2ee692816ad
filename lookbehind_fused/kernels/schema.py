"""The passes: their names and their signatures.

A pass is one walk over the tensors of a bucket. ``SCHEMAS`` is the one definition of every signature; each backend is a
module with one function per schema, of the same name and the same arguments, and a function ``bind`` that prepares a
pass to be run again and again. ``reference`` is the definition of what each pass computes.

Arguments that recur:

``params``, ``grads``
    The tensors taking part, where PyTorch put them. A gradient has its parameter's shape and dtype; strides may differ.
    A backend may take an empty list of ``params`` beside ``grads`` for what ``table`` says of them.
``slow``, ``fast``, ``first``, ``perturbed``, ``state``
    Flat buffers of the bucket, 1-D, float32 (float64 for float64 parameters). ``perturbed`` is given for bf16 and fp16
    parameters only: elsewhere the parameters themselves hold the perturbed weights. ``state`` are the base optimizer's
    buffers in the order of its rule (``lookbehind_fused.base``), as many as ``contract.BUFFERS`` says.
``fast_from``, ``state_from``, ``steps_from``
    Where the old values are read, if not from the buffer that is written; None (an empty list) means in place.
    ``fast`` may be None where the fast weights need not be kept: at inner step 1 of a rule whose update is a function
    of the new state (momentum, Adam). Inner step 2 then finds them again: under ``Flag.DERIVES`` it is given the slow
    weights for the fast ones, and moves them by the state that it reads before it uses them.
``steps``
    float32, one element per tensor of the bucket: how often the base optimizer has updated it.
``table``
    int64 of shape (tensors, 4 or more) in host memory, made by ``tensor_table``, its columns named in
    ``contract.Column``: the tensor's row in ``steps`` and ``sums``, the start and size of its slice of every flat
    buffer, in elements, and its row in ``hyper``; then its address, sizes and strides. Whoever moves a parameter writes
    its new address there, in place.
``sq_norms``, ``row``
    float64 of shape (buckets, 2), on the parameters' device: the sums of squares of T g and of g, which whoever reads
    them adds up. ``row`` is the bucket's own. A pass that ascends fills it first if it is not negative: with a single
    bucket the norm costs no call of its own.
``sums``
    float64 of shape (rows, 3): <a, b>, <a, a>, <b, b> of the displacements a = fast_1 - slow and b = fast_k - slow. One
    row a tensor under ``Flag.PER_TENSOR``, else one row a bucket.
``hyper``
    float64 of shape (groups, numbers), in host memory for backends that read it there: a row for each parameter group,
    its columns named in ``contract.Hyper`` and, for the rule's own, in ``contract.NUMBERS``. Each tensor takes the row
    that ``table`` names. A descent multiplies its gradient by ``unscale`` and, where it is given ``sq_norms``, clips
    the result to ``max_grad_norm``; an ascent is free of the gradient's scale.
``rule``, ``flags``
    A ``contract.RuleId``, and a sum of ``contract.Flag``.
``done``
    int32, one element, where ``hyper`` is, or None: set to 1 by the same call that writes, whatever it writes. Who
    finds 0 there knows that the pass has written nothing; who finds 1, that it has written everything.
``dtype``
    The parameters', for ``interpolate`` without a list of them; None: that of the list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import Column

_STATE = "Tensor(s!)[] state, Tensor[] state_from, Tensor(n!) steps, Tensor? steps_from, Tensor table"
_DESCENT = f"{_STATE}, Tensor? sq_norms, Tensor hyper, int rule, int flags"

SCHEMAS = {
    "reduce_sq_norm": "(Tensor[] params, Tensor[] grads, Tensor? perturbed, Tensor table, Tensor hyper, int flags, "
    "Tensor(a!) sq_norms, int row) -> ()",
    "ascend": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)? perturbed, Tensor(c!)? slow, Tensor table, "
    "Tensor(d!) sq_norms, int row, Tensor hyper, int flags, Tensor(e!)? done) -> ()",
    "descend": f"(Tensor[] params, Tensor[] grads, Tensor(a!)? fast, Tensor? fast_from, {_DESCENT}) -> ()",
    "descend_ascend": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)? perturbed, Tensor(c!)? fast, "
    f"Tensor? fast_from, {_STATE}, Tensor(d!) sq_norms, int row, Tensor hyper, int rule, int flags) -> ()",
    "descend_interpolate": f"(Tensor(a!)[] params, Tensor[] grads, Tensor slow, Tensor fast, {_DESCENT}, "
    "Tensor(b!)? done) -> ()",
    "descend_align": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)? perturbed, Tensor slow, Tensor fast, "
    f"Tensor? first, {_DESCENT}, Tensor(c!) sums, Tensor(d!)? done) -> ()",
    "interpolate": "(Tensor(a!)[] params, Tensor? perturbed, Tensor slow, Tensor table, Tensor sums, int flags, "
    "ScalarType? dtype) -> ()",
}

_PARSED = {
    name: torch._C.parse_schema(f"lookbehind_fused::{name}{schema}").arguments for name, schema in SCHEMAS.items()
}
ARGUMENTS = {name: [a.name for a in arguments] for name, arguments in _PARSED.items()}
"""The arguments of each pass, in order: ``params`` first, then, but for ``interpolate``, ``grads``."""
WRITTEN = {
    name: [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    for name, arguments in _PARSED.items()
}
"""Those that a pass writes."""


def _left_out(arguments: Sequence[Any]) -> dict[str, Any]:
    of_kind: dict[str, Any] = {"OptionalType": None, "ListType": []}
    found = {a.name: of_kind[a.type.kind()] for a in arguments if a.type.kind() in of_kind}
    return {**found, "row": -1}


_LEFT_OUT = {name: _left_out(arguments) for name, arguments in _PARSED.items()}


def completed(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a pass but ``params`` and ``grads``, in order: what is left out is None, an empty list, or -1
    for ``row``.

    Raises:
        TypeError: there is no such argument, or one is missing that has to be there.
    """
    names = [argument for argument in ARGUMENTS[name] if argument not in ("params", "grads")]
    for argument in arguments:
        if argument not in names:
            raise TypeError(f"{name}: expected {', '.join(names)}, got {argument!r}")
    found = {**_LEFT_OUT[name], **arguments}
    for argument in names:
        if argument not in found:
            raise TypeError(f"{name}: expected an argument {argument!r}")
    return {argument: found[argument] for argument in names}


def tensor_table(params: Sequence[Tensor], starts: Sequence[int], groups: Sequence[int]) -> Tensor:
    """The argument ``table`` for tensors whose slices of the flat buffers begin at ``starts``, and whose rows of
    ``hyper`` are ``groups``.

    int64 of shape (tensors, 5 + 2 d), d being the largest number of dimensions: tensors with fewer have dimensions of
    one element in front.
    """
    dim = max((p.dim() for p in params), default=0)
    rows = []
    for row, (p, start, group) in enumerate(zip(params, starts, groups, strict=True)):
        pad = dim - p.dim()
        sizes, strides = [*[1] * pad, *p.shape], [*[0] * pad, *p.stride()]
        rows.append([row, start, p.numel(), group, p.data_ptr(), *sizes, *strides])
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(len(rows), Column.SIZES + 2 * dim)
