"""What bug reports hold: an optimizer in words, the memory that it takes, what there is on this machine."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import kernels
from .lowering import working
from .rules import NO_RULE
from .shards import shard

if TYPE_CHECKING:
    from .loop import Loop


def version() -> str:
    """This package's, of the installed metadata. Where it was only built in place there is none."""
    try:
        return importlib.metadata.version("lookbehind-fused")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


# ---- an optimizer ----------------------------------------------------------------------------------------------------


def described(optimizer: Loop) -> str:
    """``repr``: as torch has it, a line for each setting, then the groups."""
    prepared = optimizer._prepared
    used = sorted({name_of(bucket.kernels) for bucket in prepared.buckets} - {optimizer.backend})
    held = memory_of(optimizer)
    values = {
        "base_optimizer": type(optimizer.base_optimizer).__name__,
        "backend": f"{optimizer.backend} ({', '.join(used)})" if used else optimizer.backend,
        "buckets": len(prepared.buckets) or "none before the first step",
        **({"extra memory": in_words(sum(held.values()) - held.get("state", 0))} if held else {}),
        **{name: repr(value) for name, value in optimizer.settings().items()},
    }
    _, _, groups = Optimizer.__repr__(optimizer).partition("\n")
    return "\n".join([f"{type(optimizer).__name__} (", *(f"    {name}: {x}" for name, x in values.items()), groups])


def memory_of(optimizer: Loop) -> dict[str, int]:
    """``Lookbehind.memory()``."""
    sizes: Counter[str] = Counter()
    prepared, norms = optimizer._prepared, None
    for bucket in prepared.buckets:
        bound = bucket.key is not None  # else what it was made for has been refused
        states, means = bucket.state_names, bucket.program.means if bound else ()
        uses = {**dict.fromkeys(states, "state"), **dict.fromkeys(map(working, states), "working state")}
        uses |= dict.fromkeys(means, "means")
        for name, buffer in bucket.buffers.items():
            sizes[uses.get(name, name)] += size_of(buffer)
        tables = [bucket.table, bucket.hyper, bucket.mean_hyper, bucket.sums, bucket.done, *bucket.counts.values()]
        sizes["tables"] += sum(map(size_of, tables))
        if bucket.rule.counted:
            sizes["state"] += size_of(bucket.counts["steps"])
            sizes["tables"] -= size_of(bucket.counts["steps"])
        norms = bucket.norms if bound else norms
    if norms is not None:
        sizes["tables"] += sum(map(size_of, norms.tensors))
    if prepared.buckets and prepared.rule is NO_RULE:
        entries = optimizer.base_optimizer.state.values()
        sizes["state"] += sum(size_of(x) for entry in entries for x in entry.values() if isinstance(x, Tensor))
    sizes["previous gradients"] = sum(map(size_of, optimizer._previous.kept.values()))
    return {name: size for name, size in sizes.items() if size}


def size_of(x: Tensor) -> int:
    """Bytes of a tensor; of a DTensor those of this rank's part."""
    x = shard(x)
    return x.numel() * x.element_size()


def in_words(size: int) -> str:
    """A number of bytes as people read it."""
    if size < 1024:
        return f"{size} byte" + "s" * (size != 1)
    unit = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**unit:.1f} {'KMGT'[unit - 1]}iB"


# ---- this machine ----------------------------------------------------------------------------------------------------


def name_of(backend: Any) -> str:
    """A backend's name."""
    return next(name for name, module in kernels.BACKENDS.items() if module is backend)


def show_backends() -> None:
    """Print what a bug report needs: versions, devices, and of each backend whether it is available, else why not and
    what helps.
    """
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda or 'none'}"
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "none"
    print(f"lookbehind_fused {version()}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, {runtime}, Triton {triton}")
    print(f"device cpu: {torch.get_num_threads()} threads")
    devices = ["cpu"]
    for i in range(torch.cuda.device_count()):
        devices.append(f"cuda:{i}")
        print(f"device {devices[-1]}: {torch.cuda.get_device_name(i)}")
    for name, backend in kernels.BACKENDS.items():
        why_not = backend.why_not()
        state = "available" if why_not is None else f"not available: {why_not}; {backend.REMEDY}"
        print(f"{name} for {backend.DEVICES}: {state}")
    for device in devices:
        print(f"'auto' takes {name_of(kernels.fastest(torch.device(device)))} on {device}")
