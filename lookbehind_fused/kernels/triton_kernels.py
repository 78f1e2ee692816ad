"""The Triton kernels: one program computes one chunk of one tensor.

Parameters and gradients are reached through tables of addresses, flat buffers through the start of the tensor's slice.
A program walks its chunk in blocks, without a mask and with 16-byte accesses where the addresses are multiples of 16
bytes; what is left over, and unaligned views, it walks with a mask, an element a thread. The algebra is that of
``csrc/rules.h``, with the same fused products, and the definition of every formula is ``kernels.reference``.

Arguments that all kernels have: ``rows`` and ``chunks`` of ``device.Plan``; ``P``, the parameters' dtype; ``T``, that
of the buffers and the arithmetic.
"""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from . import device
from .contract import NUMBERS, Column, Flag, Hyper, RuleId

CHUNK, SPAN = tl.constexpr(device.CHUNK), tl.constexpr(device.SPAN)  # elements of a program
THREADS = tl.constexpr(256)
BLOCK = tl.constexpr(1024)  # elements without a mask: four a thread, a 16-byte access of float32


def _known(*values: int) -> Iterator[tl.constexpr]:
    return (tl.constexpr(int(value)) for value in values)


def _own(rule: RuleId, *names: str) -> Iterator[tl.constexpr]:
    return _known(*(Hyper.OF_RULE + NUMBERS[rule].index(name) for name in names))


# What kernels know of the contract: flags, rules, the columns of ``rows`` and how many there are, the columns of
# ``hyper``, and of those the rules' own.
MAXIMIZE, NESTEROV, DECOUPLED = _known(Flag.MAXIMIZE, Flag.NESTEROV, Flag.DECOUPLED)
SGD, MOMENTUM, ADAM, AMSGRAD = _known(RuleId.SGD, RuleId.MOMENTUM, RuleId.ADAM, RuleId.AMSGRAD)
ROW, START, SIZE, GROUP, ADDRESS = _known(Column.ROW, Column.START, Column.SIZE, Column.GROUP, Column.ADDRESS)
COLUMNS = tl.constexpr(device.COLUMNS)
RHO, ETA, ALPHA = _known(Hyper.RHO, Hyper.ETA, Hyper.ALPHA)
MAX_GRAD_NORM, UNSCALE = _known(Hyper.MAX_GRAD_NORM, Hyper.UNSCALE)
SGD_LR, SGD_MOMENTUM, SGD_DAMPENING, SGD_WEIGHT_DECAY = _own(RuleId.SGD, "lr", "momentum", "dampening", "weight_decay")
ADAM_LR, ADAM_BETA1, ADAM_BETA2, ADAM_EPS, ADAM_WEIGHT_DECAY = _own(
    RuleId.ADAM, "lr", "beta1", "beta2", "eps", "weight_decay"
)
NORM_EPSILON = tl.constexpr(1e-16)
CLIP_EPSILON = tl.constexpr(1e-6)

COUNTS = ("buckets", "flags", "numbers", "tensors")  # another value compiles nothing


def options(threads_a_warp: int) -> dict[str, Any]:
    """How every kernel is compiled. Products and sums are fused where the algebra says so, nowhere else. 64 registers
    let 1,024 threads run on a multiprocessor, each with up to seven 16-byte loads under way.
    """
    common = {"num_warps": THREADS.value // threads_a_warp, "enable_fp_fusion": False}
    return common if threads_a_warp == 64 else {**common, "maxnreg": 64}


# ---- memory ----------------------------------------------------------------------------------------------------------


@triton.jit
def _place(rows, chunks, LENGTH: tl.constexpr):
    """The tensor of this program, its row in ``steps`` and ``sums``, its row in ``hyper``; the number of its chunk
    within the tensor, and the chunk's first element; the start of the tensor's slice of a flat buffer, the tensor's
    elements, and its address.
    """
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * program).to(tl.int64)
    number = tl.load(chunks + 2 * program + 1).to(tl.int64)
    own = rows + COLUMNS * tensor
    row, group, start, size = tl.load(own + ROW), tl.load(own + GROUP), tl.load(own + START), tl.load(own + SIZE)
    return tensor, row, group, number, number * LENGTH, start, size, tl.load(own + ADDRESS)


@triton.jit
def _note(done):
    """Say that this launch has taken place, if anybody asks."""
    if done is not None:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(done, 1)


@triton.jit
def _extent(begin, size, address, other, LENGTH: tl.constexpr):
    """How many elements of the chunk are walked without a mask, and how many there are."""
    count = tl.minimum(size - begin, LENGTH).to(tl.int32)
    return tl.where(((address | other) & 15) == 0, count // BLOCK * BLOCK, 0), count


@triton.jit
def _of_tensor(address, at, P: tl.constexpr, WHOLE: tl.constexpr):
    """Pointers to a block's elements, from element ``at`` of the tensor on."""
    pointer = address.to(tl.pointer_type(P)) + at
    if WHOLE:
        return tl.multiple_of(pointer, 16) + tl.arange(0, BLOCK)
    else:
        return pointer + tl.arange(0, THREADS)


@triton.jit
def _of_buffer(buffer, at, WHOLE: tl.constexpr):
    """The same in a flat buffer, where every slice starts on a boundary of 64 bytes."""
    if WHOLE:
        return tl.multiple_of(buffer + at, 16) + tl.arange(0, BLOCK)
    else:
        return buffer + at + tl.arange(0, THREADS)


@triton.jit
def _read(pointers, here, T: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointers).to(T)
    else:
        return tl.load(pointers, mask=here, other=0.0).to(T)


@triton.jit
def _write(pointers, values, here, WHOLE: tl.constexpr):
    values = values.to(pointers.dtype.element_ty)
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=here)


# ---- numbers: 0-dim float64, as on the host --------------------------------------------------------------------------
#
# Triton has every thread compute them, so that on GPUs with little double arithmetic each operation here counts.


@triton.jit
def _sq_norm(sq_norms, buckets, COLUMN: tl.constexpr):
    """||T g||^2 (column 0) or ||g||^2 (column 1) over all buckets."""
    total = tl.full([], 0.0, tl.float64)
    for bucket in range(buckets):
        total += tl.load(sq_norms + 2 * bucket + COLUMN)
    return total


@triton.jit
def _ascent_factor(sq_norms, buckets, hyper):
    return tl.load(hyper + RHO) / (tl.sqrt(_sq_norm(sq_norms, buckets, 0)) + NORM_EPSILON)


@triton.jit
def _gradient_scale(sq_norms, buckets, hyper, flags, CLIPS: tl.constexpr):
    """Unscaling, clipping, and the sign of a gradient that is to be climbed."""
    unscale = tl.load(hyper + UNSCALE)
    scale = tl.where((flags & MAXIMIZE) != 0, -unscale, unscale)
    if CLIPS:
        most = tl.load(hyper + MAX_GRAD_NORM)
        clip = most / (tl.abs(unscale) * tl.sqrt(_sq_norm(sq_norms, buckets, 1)) + CLIP_EPSILON)
        scale *= tl.where((clip > 1.0) | (most == float("inf")), 1.0, clip)  # NaN stays NaN
    return scale


@triton.jit
def _moves(sq_norms, buckets, SKIPS: tl.constexpr):
    """Whether an evaluation moves anything: where it may be skipped, only if ||T g|| and ||g|| are finite."""
    if SKIPS:
        scaled, plain = _sq_norm(sq_norms, buckets, 0), _sq_norm(sq_norms, buckets, 1)
        return (scaled < float("inf")) & (plain < float("inf"))  # NaN is not
    else:
        return True


@triton.jit
def _power(base, exponent):
    """base^exponent for a whole exponent >= 0: squares, since a library's pow is slow and not in every interpreter."""
    result = tl.full([], 1.0, tl.float64)
    while exponent > 0:
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


# ---- the algebra of one element --------------------------------------------------------------------------------------


@triton.jit
def _interpolated(slow, fast, alpha):
    """slow + alpha * (fast - slow) as torch.lerp computes it: alpha = 1 gives exactly fast."""
    difference = fast - slow
    small = alpha < 0.5
    return tl.fma(difference, tl.where(small, alpha, alpha - 1.0), tl.where(small, slow, fast))


@triton.jit
def _ascended(w, g, factor, eta, ADAPTS: tl.constexpr):
    """w + factor * T^2 g."""
    if ADAPTS:
        scaling = tl.abs(w) + eta
        g = scaling * scaling * g
    return w + g * factor


@triton.jit
def _adam_correction(step, hyper, T: tl.constexpr):
    """Adam's step size and the root that it divides the second moment's by, at update number ``step``."""
    lr, beta1, beta2 = tl.load(hyper + ADAM_LR), tl.load(hyper + ADAM_BETA1), tl.load(hyper + ADAM_BETA2)
    return (lr / (1.0 - _power(beta1, step))).to(T), tl.sqrt(1.0 - _power(beta2, step)).to(T)


@triton.jit
def _constants(step, hyper, flags, T: tl.constexpr, RULE: tl.constexpr, DERIVES: tl.constexpr):
    """A rule's numbers at a tensor's update number ``step``, as in rules.h: computed once, used for every element."""
    zero = tl.full([], 0.0, T)
    if RULE == SGD or RULE == MOMENTUM:  # noqa: SIM109
        momentum, is_first, nesterov = tl.load(hyper + SGD_MOMENTUM), step == 1, (flags & NESTEROV) != 0
        lr, weight_decay = tl.load(hyper + SGD_LR).to(T), tl.load(hyper + SGD_WEIGHT_DECAY).to(T)
        keep = tl.where(is_first, 0.0, momentum).to(T)
        gain = tl.where(is_first, 1.0, 1.0 - tl.load(hyper + SGD_DAMPENING)).to(T)
        direct, through = tl.where(nesterov, 1.0, 0.0).to(T), tl.where(nesterov, momentum, 1.0).to(T)
        return lr, weight_decay, keep, gain, direct, through, zero, zero, zero, zero
    elif RULE == ADAM or RULE == AMSGRAD:  # noqa: SIM109
        beta1, beta2 = tl.load(hyper + ADAM_BETA1), tl.load(hyper + ADAM_BETA2)
        weight_decay, decoupled = tl.load(hyper + ADAM_WEIGHT_DECAY), (flags & DECOUPLED) != 0
        step_size, root = _adam_correction(step, hyper, T)
        before, root_before = zero, zero
        if DERIVES:
            before, root_before = _adam_correction(step - 1, hyper, T)
        coupled = tl.where(decoupled, 0.0, weight_decay).to(T)
        shrink = tl.where(decoupled, 1.0 - tl.load(hyper + ADAM_LR) * weight_decay, 1.0).to(T)
        rest1, rest2, eps = (1.0 - beta1).to(T), (1.0 - beta2).to(T), tl.load(hyper + ADAM_EPS).to(T)
        return step_size, root, rest1, beta2.to(T), rest2, eps, coupled, shrink, before, root_before
    else:
        return zero, zero, zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def _adam_moved(w, exp_avg, second, step_size, root, eps, shrink):
    return w * shrink - step_size * exp_avg / (tl.sqrt(second) / root + eps)


@triton.jit
def _derived(w, m0, m1, m2, constants, RULE: tl.constexpr):
    """What the update before this one, which has left this state, made of w."""
    if RULE == MOMENTUM:
        lr = constants[0]
        return tl.fma(m0, -lr, w)
    else:
        _, _, _, _, _, eps, _, shrink, step_size, root = constants
        return _adam_moved(w, m0, m1 if RULE == ADAM else m2, step_size, root, eps, shrink)


@triton.jit
def _updated(w, g, m0, m1, m2, constants, RULE: tl.constexpr):
    """w and the state after an update."""
    if RULE == SGD or RULE == MOMENTUM:  # noqa: SIM109
        lr, weight_decay, keep, gain, direct, through, _, _, _, _ = constants
        g = tl.fma(w, weight_decay, g)
        if RULE == MOMENTUM:
            m0 = tl.fma(g, gain, keep * m0)
            g = tl.fma(m0, through, direct * g)
        w = tl.fma(g, -lr, w)
    elif RULE == ADAM or RULE == AMSGRAD:  # noqa: SIM109
        step_size, root, rest1, beta2, rest2, eps, coupled, shrink, _, _ = constants
        g = tl.fma(w, coupled, g)
        m1 = tl.fma(rest2 * g, g, beta2 * m1)  # first: else sm100 has too few registers
        m0 = _interpolated(m0, g, rest1)
        if RULE == AMSGRAD:
            m2 = tl.where(m2 > m1, m2, m1)
        w = _adam_moved(w, m0, m1 if RULE == ADAM else m2, step_size, root, eps, shrink)
    return w, m0, m1, m2


# ---- sums in a fixed order -------------------------------------------------------------------------------------------


@triton.jit
def _by_thread(x, WHOLE: tl.constexpr):
    """A block's numbers added up within each thread: one register for a sum instead of four."""
    if WHOLE:
        return tl.sum(tl.reshape(x, [THREADS, BLOCK // THREADS]), 1)
    else:
        return x


@triton.jit
def _sum_in_order(values, first, count, TERMS: tl.constexpr, TERM: tl.constexpr):
    """Term TERM of ``count`` rows of TERMS numbers, from row ``first`` on."""
    total = tl.zeros([1024], tl.float64)
    for start in range(0, count, 1024):
        i = start + tl.arange(0, 1024)
        total += tl.load(values + (first + i) * TERMS + TERM, mask=i < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _is_last(counter, count):
    """Whether ``count`` - 1 other programs have come here before; what they had stored before is then visible, and the
    counter is as it was.
    """
    tl.debug_barrier()
    came = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    if came == count - 1:
        tl.store(counter, 0)
    return came == count - 1


@triton.jit
def _add_up(
    x0, x1, x2, tensor, row, number, size, partials, tensor_sums, counters, tensors, out, LENGTH: tl.constexpr,
    PER_TENSOR: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """``out`` = the sums over all chunks, or in each tensor's own row those of the tensor.

    The last program of each tensor adds up its chunks, and the last of those the tensors: in all it is linear in the
    number of chunks, and always in the same order.
    """
    program = tl.program_id(0).to(tl.int64)
    tl.store(partials + program * TERMS, x0)
    tl.store(partials + program * TERMS + 1, x1)
    if TERMS == 3:
        tl.store(partials + program * TERMS + 2, x2)
    count = tl.maximum((size + LENGTH - 1) // LENGTH, 1).to(tl.int32)
    if _is_last(counters + 1 + tensor, count):
        first = program - number
        to = out + row * TERMS if PER_TENSOR else tensor_sums + tensor * TERMS
        tl.store(to, _sum_in_order(partials, first, count, TERMS, 0))
        tl.store(to + 1, _sum_in_order(partials, first, count, TERMS, 1))
        if TERMS == 3:
            tl.store(to + 2, _sum_in_order(partials, first, count, TERMS, 2))
        if not PER_TENSOR:  # noqa: SIM102
            if _is_last(counters, tensors):
                tl.store(out, _sum_in_order(tensor_sums, 0, tensors, TERMS, 0))
                tl.store(out + 1, _sum_in_order(tensor_sums, 0, tensors, TERMS, 1))
                if TERMS == 3:
                    tl.store(out + 2, _sum_in_order(tensor_sums, 0, tensors, TERMS, 2))


# ---- the passes: each walks its chunk in blocks, without a mask or with one ------------------------------------------


@triton.jit
def _squares(
    address, gradient, perturbed, begin, start, from_, to, eta, P: tl.constexpr, T: tl.constexpr, ADAPTS: tl.constexpr,
    WHOLE: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The sums of squares of T g and of g of elements ``from_`` to ``to``, STRIDE at once, each stride's in T."""
    WIDTH: tl.constexpr = BLOCK if WHOLE else THREADS
    plain, scaled = tl.zeros([THREADS], tl.float64), tl.zeros([THREADS], tl.float64)
    for offset in range(from_, to, STRIDE):
        squares, scaled_squares = tl.zeros([THREADS], T), tl.zeros([THREADS], T)
        for block in tl.static_range(STRIDE // WIDTH):
            at = begin + offset + block * WIDTH
            here = tl.arange(0, WIDTH) < to - offset
            g = _read(_of_tensor(gradient, at, P, WHOLE), here, T, WHOLE)
            squares += _by_thread(g * g, WHOLE)
            if ADAPTS:
                if perturbed is None:
                    w = _read(_of_tensor(address, at, P, WHOLE), here, T, WHOLE)
                else:
                    w = _read(_of_buffer(perturbed, start + at, WHOLE), here, T, WHOLE)
                g = (tl.abs(w) + eta) * g
                scaled_squares += _by_thread(g * g, WHOLE)
        plain += squares.to(tl.float64)
        scaled += scaled_squares.to(tl.float64)
    total = tl.sum(plain, 0)
    return tl.sum(scaled, 0) if ADAPTS else total, total


@triton.jit(do_not_specialize=COUNTS)
def reduce_sq_norm(
    rows, chunks, grads, perturbed, hyper, numbers, partials, tensor_sums, counters, tensors, out, P: tl.constexpr,
    T: tl.constexpr, ADAPTS: tl.constexpr,
):  # fmt: skip
    """``out`` = the sums of squares of T g and of g."""
    tensor, row, group, number, begin, start, size, address = _place(rows, chunks, SPAN)
    gradient, eta = tl.load(grads + tensor), tl.load(hyper + group * numbers + ETA).to(T)
    split, count = _extent(begin, size, address, gradient, SPAN)
    chunks_end = split // CHUNK * CHUNK
    scaled, plain = _squares(address, gradient, perturbed, begin, start, 0, chunks_end, eta, P, T, ADAPTS, True, CHUNK)
    more_scaled, more_plain = _squares(
        address, gradient, perturbed, begin, start, chunks_end, split, eta, P, T, ADAPTS, True, BLOCK
    )
    rest_scaled, rest_plain = _squares(
        address, gradient, perturbed, begin, start, split, count, eta, P, T, ADAPTS, False, THREADS
    )
    scaled, plain = scaled + more_scaled + rest_scaled, plain + more_plain + rest_plain
    # The square of a finite float may not be one: where there is an infinite sum, this program's terms in double.
    if tl.float64 != T and (scaled == float("inf")) | (plain == float("inf")):
        scaled, plain = _squares(
            address,
            gradient,
            perturbed,
            begin,
            start,
            0,
            count,
            eta.to(tl.float64),
            P,
            tl.float64,
            ADAPTS,
            False,
            THREADS,
        )
    _add_up(
        scaled, plain, plain, tensor, row, number, size, partials, tensor_sums, counters, tensors, out, SPAN, False, 2
    )


@triton.jit
def _ascend(
    address, gradient, perturbed, slow, begin, start, from_, to, factor, eta, moves, P: tl.constexpr, T: tl.constexpr,
    ADAPTS: tl.constexpr, SKIPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK if WHOLE else THREADS
    for offset in range(from_, to, WIDTH):
        at, here = begin + offset, tl.arange(0, WIDTH) < to - offset
        params = _of_tensor(address, at, P, WHOLE)
        g = _read(_of_tensor(gradient, at, P, WHOLE), here, T, WHOLE)
        if slow is not None or perturbed is None:
            w = _read(params, here, T, WHOLE)
        else:
            w = _read(_of_buffer(perturbed, start + at, WHOLE), here, T, WHOLE)
        if slow is not None:
            _write(_of_buffer(slow, start + at, WHOLE), w, here, WHOLE)
        x = _ascended(w, g, factor, eta, ADAPTS)
        if SKIPS:
            x = tl.where(moves, x, w)
        if perturbed is not None:
            _write(_of_buffer(perturbed, start + at, WHOLE), x, here, WHOLE)
        _write(params, x, here, WHOLE)


@triton.jit(do_not_specialize=COUNTS)
def ascend(
    rows, chunks, grads, perturbed, slow, sq_norms, buckets, hyper, numbers, done, P: tl.constexpr, T: tl.constexpr,
    ADAPTS: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """Move the perturbed weights; where there is ``slow``, keep the weights there first."""
    tensor, _, group, _, begin, start, size, address = _place(rows, chunks, CHUNK)
    _note(done)
    gradient, hyper = tl.load(grads + tensor), hyper + group * numbers
    factor, eta = _ascent_factor(sq_norms, buckets, hyper).to(T), tl.load(hyper + ETA).to(T)
    moves = _moves(sq_norms, buckets, SKIPS)
    split, count = _extent(begin, size, address, gradient, CHUNK)
    _ascend(address, gradient, perturbed, slow, begin, start, 0, split, factor, eta, moves, P, T, ADAPTS, SKIPS, True)
    _ascend(
        address, gradient, perturbed, slow, begin, start, split, count, factor, eta, moves, P, T, ADAPTS, SKIPS, False
    )


@triton.jit
def _read_state(buffers, at, here, otherwise, T: tl.constexpr, WHOLE: tl.constexpr):
    """The state's three buffers, ``otherwise`` in the place of one that is not there."""
    b0, b1, b2 = buffers
    m0, m1, m2 = otherwise, otherwise, otherwise
    if b0 is not None:
        m0 = _read(_of_buffer(b0, at, WHOLE), here, T, WHOLE)
    if b1 is not None:
        m1 = _read(_of_buffer(b1, at, WHOLE), here, T, WHOLE)
    if b2 is not None:
        m2 = _read(_of_buffer(b2, at, WHOLE), here, T, WHOLE)
    return m0, m1, m2


@triton.jit
def _read_perturbed(params, perturbed, at, here, T: tl.constexpr, WHOLE: tl.constexpr):
    """The perturbed weights: the parameters, or where those are rounded a buffer."""
    if perturbed is None:
        return _read(params, here, T, WHOLE)
    else:
        return _read(_of_buffer(perturbed, at, WHOLE), here, T, WHOLE)


@triton.jit
def _descend_blocks(
    address, gradient, perturbed, slow, fast, fast_from, first, state, state_from, constants, begin, start, from_, to,
    scale, factor, eta, alpha, moves, P: tl.constexpr, T: tl.constexpr, RULE: tl.constexpr, ADAPTS: tl.constexpr,
    SKIPS: tl.constexpr, DERIVES: tl.constexpr, ASCENDS: tl.constexpr, INTERPOLATES: tl.constexpr, ALIGNS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK if WHOLE else THREADS
    # Beside three states and an array of perturbed weights, what is needed last would be spilled.
    EARLY: tl.constexpr = RULE != AMSGRAD or perturbed is None or SKIPS
    s0, s1, s2 = state
    ab, aa, bb = tl.zeros([THREADS], T), tl.zeros([THREADS], T), tl.zeros([THREADS], T)
    for offset in range(from_, to, WIDTH):
        in_tensor, here = begin + offset, tl.arange(0, WIDTH) < to - offset
        at = start + in_tensor
        params = _of_tensor(address, in_tensor, P, WHOLE)
        # All reads before the first write: it may be to where a later read is from, for all that the compiler knows.
        g = _read(_of_tensor(gradient, in_tensor, P, WHOLE), here, T, WHOLE)
        given = _read(_of_buffer(fast_from, at, WHOLE), here, T, WHOLE)
        m0, m1, m2 = _read_state(state_from, at, here, g, T, WHOLE)
        x, origin, fast_1 = g, given, given
        if ASCENDS and EARLY:
            x = _read_perturbed(params, perturbed, at, here, T, WHOLE)
        if (INTERPOLATES or ALIGNS) and EARLY and slow is not None:
            origin = _read(_of_buffer(slow, at, WHOLE), here, T, WHOLE)
        if ALIGNS and EARLY and first is not None:
            fast_1 = _read(_of_buffer(first, at, WHOLE), here, T, WHOLE)
        before = given
        if DERIVES:
            before = _derived(given, m0, m1, m2, constants, RULE)
        o0, o1, o2 = m0, m1, m2
        w, m0, m1, m2 = _updated(before, g * scale, o0, o1, o2, constants, RULE)
        if SKIPS and (INTERPOLATES or ALIGNS):  # the step does not take place: its weights are slow, its state stays
            before, w = tl.where(moves, before, origin), tl.where(moves, w, origin)
            o0, o1, o2 = _read_state(state, at, here, g, T, WHOLE)
        if SKIPS:
            w = tl.where(moves, w, before)
            m0, m1, m2 = tl.where(moves, m0, o0), tl.where(moves, m1, o1), tl.where(moves, m2, o2)
        if s0 is not None:
            _write(_of_buffer(s0, at, WHOLE), m0, here, WHOLE)
        if s1 is not None:
            _write(_of_buffer(s1, at, WHOLE), m1, here, WHOLE)
        if s2 is not None:
            _write(_of_buffer(s2, at, WHOLE), m2, here, WHOLE)
        if not EARLY and (INTERPOLATES or ALIGNS) and slow is not None:
            origin = _read(_of_buffer(slow, at, WHOLE), here, T, WHOLE)
        if fast is not None:
            _write(_of_buffer(fast, at, WHOLE), w, here, WHOLE)
        if ASCENDS:
            if not EARLY:
                x = _read_perturbed(params, perturbed, at, here, T, WHOLE)
            ascended = _ascended(x, g, factor, eta, ADAPTS)
            x = tl.where(moves, ascended, x) if SKIPS else ascended
            if perturbed is not None:
                _write(_of_buffer(perturbed, at, WHOLE), x, here, WHOLE)
            _write(params, x, here, WHOLE)
        if INTERPOLATES or ALIGNS:
            if INTERPOLATES:
                _write(params, _interpolated(origin, w, alpha), here, WHOLE)
            else:
                if first is not None:
                    if not EARLY:
                        fast_1 = _read(_of_buffer(first, at, WHOLE), here, T, WHOLE)
                    before = tl.where(moves, fast_1, origin) if SKIPS else fast_1
                if perturbed is not None:
                    _write(_of_buffer(perturbed, at, WHOLE), w, here, WHOLE)
                _write(params, w, here, WHOLE)
                a, b = before - origin, w - origin
                if not WHOLE:  # what Adam makes of nothing is not zero
                    a, b = tl.where(here, a, 0.0), tl.where(here, b, 0.0)
                ab += _by_thread(a * b, WHOLE)
                aa += _by_thread(a * a, WHOLE)
                bb += _by_thread(b * b, WHOLE)
    if ALIGNS:
        return tl.sum(ab, 0).to(tl.float64), tl.sum(aa, 0).to(tl.float64), tl.sum(bb, 0).to(tl.float64)
    else:
        zero = tl.full([], 0.0, tl.float64)
        return zero, zero, zero


@triton.jit
def _alignment(
    rows, chunks, perturbed, slow, fast_from, first, state_from, constants, P: tl.constexpr, T: tl.constexpr,
    RULE: tl.constexpr, DERIVES: tl.constexpr,
):  # fmt: skip
    """A chunk's sums in double, of what its last descent has left: fast_k in the place of the perturbed weights. Where
    fast_1 is derived, the descent has written another state than it has read, as in every program.
    """
    tl.debug_barrier()  # fast_k was written by other threads
    _, _, _, _, begin, start, size, address = _place(rows, chunks, CHUNK)  # once more, else sm80 has too few registers
    _, count = _extent(begin, size, address, address, CHUNK)
    ab, aa, bb = tl.zeros([THREADS], tl.float64), tl.zeros([THREADS], tl.float64), tl.zeros([THREADS], tl.float64)
    for offset in range(0, count, THREADS):
        in_tensor, here = begin + offset, tl.arange(0, THREADS) < count - offset
        at = start + in_tensor
        given = _read(_of_buffer(fast_from, at, False), here, T, False)
        origin, before = given, given
        if slow is not None:
            origin = _read(_of_buffer(slow, at, False), here, T, False)
        if first is not None:
            before = _read(_of_buffer(first, at, False), here, T, False)
        elif DERIVES:
            m0, m1, m2 = _read_state(state_from, at, here, given, T, False)
            before = _derived(given, m0, m1, m2, constants, RULE)
        if perturbed is None:
            w = _read(_of_tensor(address, in_tensor, P, False), here, T, False)
        else:
            w = _read(_of_buffer(perturbed, at, False), here, T, False)
        a, b = tl.where(here, before - origin, 0.0).to(tl.float64), tl.where(here, w - origin, 0.0).to(tl.float64)
        ab += a * b
        aa += a * a
        bb += b * b
    return tl.sum(ab, 0), tl.sum(aa, 0), tl.sum(bb, 0)


@triton.jit
def _descend(
    rows, chunks, grads, perturbed, slow, fast, fast_from, first, state, state_from, steps, steps_from, sq_norms,
    buckets, hyper, numbers, flags, done, P: tl.constexpr, T: tl.constexpr, RULE: tl.constexpr, ADAPTS: tl.constexpr,
    SKIPS: tl.constexpr, DERIVES: tl.constexpr, CLIPS: tl.constexpr, ASCENDS: tl.constexpr, INTERPOLATES: tl.constexpr,
    ALIGNS: tl.constexpr,
):  # fmt: skip
    """What the four passes that descend have in common. Returns a chunk's sums, and where it is.

    ``slow`` is None where ``fast_from`` holds the slow weights, at inner step 1 and where the fast ones are derived.
    """
    tensor, row, group, number, begin, start, size, address = _place(rows, chunks, CHUNK)
    _note(done)
    gradient, hyper = tl.load(grads + tensor), hyper + group * numbers
    moves = _moves(sq_norms, buckets, SKIPS)
    step = tl.load(steps_from + row) + 1.0
    if number == 0:
        if SKIPS and (INTERPOLATES or ALIGNS):
            tl.store(steps + row, step, mask=moves)
        else:
            tl.store(steps + row, tl.where(moves, step, step - 1.0) if SKIPS else step)
    constants = _constants(step.to(tl.int32), hyper, flags, T, RULE, DERIVES)
    scale = _gradient_scale(sq_norms, buckets, hyper, flags, CLIPS).to(T)
    factor, eta, alpha = scale, tl.load(hyper + ETA).to(T), tl.load(hyper + ALPHA).to(T)
    if ASCENDS:
        factor = _ascent_factor(sq_norms, buckets, hyper).to(T)
    split, count = _extent(begin, size, address, gradient, CHUNK)
    ab, aa, bb = _descend_blocks(
        address, gradient, perturbed, slow, fast, fast_from, first, state, state_from, constants, begin, start, 0,
        split, scale, factor, eta, alpha, moves, P, T, RULE, ADAPTS, SKIPS, DERIVES, ASCENDS, INTERPOLATES, ALIGNS,
        True,
    )  # fmt: skip
    more_ab, more_aa, more_bb = _descend_blocks(
        address, gradient, perturbed, slow, fast, fast_from, first, state, state_from, constants, begin, start, split,
        count, scale, factor, eta, alpha, moves, P, T, RULE, ADAPTS, SKIPS, DERIVES, ASCENDS, INTERPOLATES, ALIGNS,
        False,
    )  # fmt: skip
    ab, aa, bb = ab + more_ab, aa + more_aa, bb + more_bb
    if ALIGNS and tl.float64 != T:  # noqa: SIM102
        if (aa == float("inf")) | (bb == float("inf")):  # as in reduce_sq_norm
            ab, aa, bb = _alignment(
                rows, chunks, perturbed, slow, fast_from, first, state_from, constants, P, T, RULE, DERIVES
            )
    return ab, aa, bb, tensor, row, number, size


@triton.jit(do_not_specialize=COUNTS)
def descend(
    rows, chunks, grads, fast, fast_from, s0, s1, s2, f0, f1, f2, steps, steps_from, sq_norms, buckets, hyper, numbers,
    flags, P: tl.constexpr, T: tl.constexpr, RULE: tl.constexpr, SKIPS: tl.constexpr, DERIVES: tl.constexpr,
    CLIPS: tl.constexpr,
):  # fmt: skip
    """Move the fast weights."""
    _descend(
        rows, chunks, grads, None, None, fast, fast_from, None, (s0, s1, s2), (f0, f1, f2), steps, steps_from,
        sq_norms, buckets, hyper, numbers, flags, None, P, T, RULE, False, SKIPS, DERIVES, CLIPS, False, False, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def descend_ascend(
    rows, chunks, grads, perturbed, fast, fast_from, s0, s1, s2, f0, f1, f2, steps, steps_from, sq_norms, buckets,
    hyper, numbers, flags, P: tl.constexpr, T: tl.constexpr, RULE: tl.constexpr, ADAPTS: tl.constexpr,
    SKIPS: tl.constexpr, DERIVES: tl.constexpr,
):  # fmt: skip
    """Move the fast weights, then the perturbed ones."""
    _descend(
        rows, chunks, grads, perturbed, None, fast, fast_from, None, (s0, s1, s2), (f0, f1, f2), steps, steps_from,
        sq_norms, buckets, hyper, numbers, flags, None, P, T, RULE, ADAPTS, SKIPS, DERIVES, True, True, False, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def descend_interpolate(
    rows, chunks, grads, slow, fast_from, s0, s1, s2, f0, f1, f2, steps, steps_from, sq_norms, buckets, hyper, numbers,
    flags, done, P: tl.constexpr, T: tl.constexpr, RULE: tl.constexpr, SKIPS: tl.constexpr, DERIVES: tl.constexpr,
    CLIPS: tl.constexpr,
):  # fmt: skip
    """The last descent, and the new weights between slow and fast."""
    _descend(
        rows, chunks, grads, None, slow, None, fast_from, None, (s0, s1, s2), (f0, f1, f2), steps, steps_from,
        sq_norms, buckets, hyper, numbers, flags, done, P, T, RULE, False, SKIPS, DERIVES, CLIPS, False, True, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def descend_align(
    rows, chunks, grads, perturbed, slow, fast_from, first, s0, s1, s2, f0, f1, f2, steps, steps_from, sq_norms,
    buckets, hyper, numbers, flags, done, partials, tensor_sums, counters, tensors, out, P: tl.constexpr,
    T: tl.constexpr, RULE: tl.constexpr, SKIPS: tl.constexpr, DERIVES: tl.constexpr, CLIPS: tl.constexpr,
    PER_TENSOR: tl.constexpr,
):  # fmt: skip
    """The last descent, which leaves fast_k where the perturbed weights were, and the sums that alpha* is made of."""
    ab, aa, bb, tensor, row, number, size = _descend(
        rows, chunks, grads, perturbed, slow, None, fast_from, first, (s0, s1, s2), (f0, f1, f2), steps, steps_from,
        sq_norms, buckets, hyper, numbers, flags, done, P, T, RULE, False, SKIPS, DERIVES, CLIPS, False, False, True,
    )  # fmt: skip
    _add_up(ab, aa, bb, tensor, row, number, size, partials, tensor_sums, counters, tensors, out, CHUNK, PER_TENSOR, 3)


@triton.jit
def _interpolate(
    address, perturbed, slow, begin, start, from_, to, alpha, P: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr
):
    WIDTH: tl.constexpr = BLOCK if WHOLE else THREADS
    for offset in range(from_, to, WIDTH):
        at, here = begin + offset, tl.arange(0, WIDTH) < to - offset
        params = _of_tensor(address, at, P, WHOLE)
        if perturbed is None:
            fast = _read(params, here, T, WHOLE)
        else:
            fast = _read(_of_buffer(perturbed, start + at, WHOLE), here, T, WHOLE)
        origin = _read(_of_buffer(slow, start + at, WHOLE), here, T, WHOLE)
        _write(params, _interpolated(origin, fast, alpha), here, WHOLE)


@triton.jit(do_not_specialize=COUNTS)
def interpolate(
    rows, chunks, perturbed, slow, sums, buckets, P: tl.constexpr, T: tl.constexpr, PER_TENSOR: tl.constexpr
):
    """New weights between slow and fast_k with alpha* = (cos + 1) / 2; the cosine of a zero vector is 0."""
    _, row, _, _, begin, start, size, address = _place(rows, chunks, CHUNK)
    ab, aa, bb = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    if PER_TENSOR:
        own = sums + 3 * row
        ab, aa, bb = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    else:
        for bucket in range(buckets):
            ab += tl.load(sums + 3 * bucket)
            aa += tl.load(sums + 3 * bucket + 1)
            bb += tl.load(sums + 3 * bucket + 2)
    norms = tl.sqrt(aa) * tl.sqrt(bb)
    cosine = tl.where(norms == 0, 0.0, ab / tl.where(norms == 0, 1.0, norms))
    cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))  # NaN stays NaN
    alpha = ((cosine + 1.0) / 2.0).to(T)
    split, count = _extent(begin, size, address, address, CHUNK)
    _interpolate(address, perturbed, slow, begin, start, 0, split, alpha, P, T, True)
    _interpolate(address, perturbed, slow, begin, start, split, count, alpha, P, T, False)
