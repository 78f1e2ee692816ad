"""The table of passes on the Triton kernels, without a GPU: in Triton's interpreter, or compiled and executed.

A process of its own, since Triton is either interpreted or compiled, from its import on::

    python -m tests.kernels.triton_cases interpreter --dtype bfloat16 --passes ascend
    python -m tests.kernels.triton_cases sm80 --dtype float32 --passes descend

The compiled kernels are executed on CPU tensors by ``gpusim``, which has to be on PYTHONPATH. Prints a line for each
case that fails, and last how many there were.
"""

import argparse
import itertools
import os
import random
import sys
from collections.abc import Callable
from typing import Any

SIZES = {"interpreter": [7, 1, 0, 130, 9_219, 33, 512, 1000], "compiled": [7, 1, 0, 5_137, 33, 1_500]}


def main() -> int:
    """0 if every case passes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("where", choices=["interpreter", "sm80", "sm90", "sm100"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--passes", default="")
    parser.add_argument("--sample", type=int, default=1, help="every how manieth case")
    parser.add_argument("--most", type=int, default=10**9, help="how many cases at the most")
    parser.add_argument("--seed", type=int, help="instead of every so manieth, draw as many cases as --most says")
    parser.add_argument("--tensors", type=int, default=0, help="how many small tensors instead of the usual ones")
    parser.add_argument("--steps", action="store_true", help="instead: whole steps of the optimizer (compiled only)")
    parser.add_argument("--graphed", nargs="*", help="instead: captured steps (compiled only), of parts of names")
    parser.add_argument("--far", action="store_true", help="instead: the last chunk of a tensor of 3e9 elements")
    chosen = parser.parse_args()
    if chosen.where == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"

    import torch

    from tests.kernels.passes import VARIANTS, cases, drawn

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # with NaN in all fresh memory
    prepare = interpreter if chosen.where == "interpreter" else executor(int(chosen.where.removeprefix("sm")))
    from lookbehind_fused.kernels import triton as backend

    if chosen.far:
        return far()
    if chosen.steps:
        return whole_steps(chosen)
    if chosen.graphed is not None:
        from tests.kernels import graphed

        register_by_call()
        return graphed.report("triton", chosen.graphed)
    dtype, ran, failed = getattr(torch, chosen.dtype), 0, 0
    names = chosen.passes.split(",") if chosen.passes else sorted({name for name, _ in VARIANTS})
    sizes = SIZES["interpreter" if chosen.where == "interpreter" else "compiled"]
    if chosen.tensors:
        sizes = [1 + 5 * number % 23 for number in range(chosen.tensors)]
    if chosen.seed is None:
        table = (case for name, rule in VARIANTS if name in names for case in cases(dtype, name, rule, sizes))
        numbered = itertools.islice(enumerate(table, 1), chosen.sample - 1, None, chosen.sample)
    else:
        numbered = drawn(dtype, names, sizes, chosen.most, chosen.seed)
    for number, case in itertools.islice(numbered, chosen.most):
        ran += 1
        prepare(case, number)
        try:
            case.check(backend)
            if case.name == "reduce_sq_norm":
                check_again(case, backend)
        except Exception as error:
            failed += 1
            rule = case.arguments.get("rule", "")
            print(f"{case.name} {rule} {dtype} case {number}: {type(error).__name__}: {error}"[:2000])
    print(f"{ran} cases, {failed} failed")
    return int(failed > 0 or ran == 0)


def check_again(case: Any, backend: Any) -> None:
    """The same sums from a second call, which finds the first one's counters and partial sums."""
    import torch

    from lookbehind_fused.kernels import reference

    expected, arguments = case.run(reference, torch.float64), case.copies()
    given = dict(arguments)
    params, grads, table = (given.pop(name) for name in ("params", "grads", "table"))
    run = backend.bind("reduce_sq_norm", params, table, given)
    for _ in range(2):
        arguments["sq_norms"][case.arguments["row"]] = float("nan")
        run(grads)
        case.check_written(arguments, expected)


def interpreter(case: Any, number: int) -> None:
    """Nothing to prepare for a case, but bfloat16 is to be rounded as on a GPU."""
    import gpusim.interp_patch  # noqa: F401


def executor(capability: int) -> Callable[[Any, int], None]:
    """Compile for a GPU of this compute capability and run the result. Half of the cases run in a random schedule.

    Gradients are read-only, and every parameter and gradient is an array of its own, so that an access beside it is an
    error. Two blocks that touch one element, one of them writing, are an error too, but in the kernels that add up:
    there the last block reads on purpose what the others have written.
    """
    from gpusim import simdriver

    driver = simdriver.activate(capability)

    def prepare(case: Any, number: int) -> None:
        copies = case.copies

        def registered(dtype: Any = None) -> dict[str, Any]:
            arguments = copies(dtype)
            if dtype is None:
                driver.clear()
                driver.register(*(p for p in arguments["params"] if p.numel()))
                driver.register(*(g for g in arguments.get("grads", ()) if g.numel()), readonly=True)
            return arguments

        case.copies = registered
        adds_up = case.name in ("reduce_sq_norm", "descend_align") or case.arguments.get("row", -1) >= 0
        schedule = ("lockstep", "random")[number % 2]
        driver.opts.update(strict=not adds_up, schedule=schedule, seed=number, approx="jitter")

    return prepare


def whole_steps(asked: argparse.Namespace) -> int:
    """Lookbehind on this backend against the reference in float64, over settings and base optimizers."""
    import torch

    from tests.gpu.steps import step_cases, trained

    register_by_call()
    chosen = step_cases(asked.sample)
    if asked.seed is not None:
        chosen = random.Random(asked.seed).sample(step_cases(), asked.most)
    failed = 0
    for base, settings in chosen:
        expected = trained("cpu", "reference", base, settings, torch.float64, steps=2)
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2 * 2e-6)):
            found = trained("cpu", "triton", base, settings, dtype, steps=2)
            error = float((found - expected).abs().max() / expected.abs().max())
            if not error <= bound:
                failed += 1
                print(f"{base[0].__name__} {settings} {dtype}: {error:.1e} > {bound:.0e}")
    print(f"{2 * len(chosen)} cases, {failed} failed")
    return int(failed > 0)


def register_by_call() -> None:
    """Each call of a pass tells the simulator which tensors its kernels find by address."""
    from gpusim import simdriver

    from lookbehind_fused.kernels.device import Call

    driver, launch = simdriver._active, Call.launch

    def registered(self: Any) -> None:
        driver.clear()
        driver.register(*(p.detach() for p in self.params if p.numel()))
        driver.register(*(g for g in self.kept if g.numel()), readonly=True)
        launch(self)

    Call.launch = registered


def far() -> int:
    """Run the last program of an ascent over 3,000,000,001 elements, of which only those of its chunk have memory.

    The addresses that the tables hold are those of the chunk less its offset: only the right offset leads back.
    """
    import torch
    from gpusim import simdriver

    from lookbehind_fused.kernels import triton_kernels as kernels

    size, chunk = 3_000_000_001, kernels.CHUNK.value
    number = size // chunk
    begin, count = number * chunk, size - number * chunk
    p, g, slow = torch.ones(count), torch.full((count,), 2.0), torch.zeros(count)
    expected = p + 0.5 * g
    driver = simdriver.activate(90)
    driver.register(p, slow)
    driver.register(g, readonly=True)
    rows = torch.tensor([[0, -begin, size, 0, p.data_ptr() - 4 * begin]])
    grads, chunks = torch.tensor([g.data_ptr() - 4 * begin]), torch.tensor([[0, number]], dtype=torch.int32)
    norms, hyper = torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.tensor([[0.5, 0]], dtype=torch.float64)
    import triton.language as tl

    kernels.ascend[(1,)](
        rows=rows, chunks=chunks, grads=grads, perturbed=None, slow=slow, sq_norms=norms, buckets=1, hyper=hyper,
        numbers=2, done=None, P=tl.float32, T=tl.float32, ADAPTS=False, SKIPS=False, **kernels.options(32),
    )  # fmt: skip
    assert torch.equal(slow, torch.ones(count))
    assert torch.equal(p, expected)
    print(f"the last chunk of {size:,} elements is at its place")
    return 0


if __name__ == "__main__":
    sys.exit(main())
