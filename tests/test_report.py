"""What bug reports hold: an optimizer in words, the memory that it takes, what there is on this machine."""

import importlib.metadata
import platform

import pytest
import torch
from torch import Tensor, nn

import lookbehind_fused
from lookbehind_fused import Lookahead, Lookbehind, MultistepSAM, compat, kernels, report
from lookbehind_fused.kernels import native, triton

SIZE = 64  # elements: no padding
BYTES = 4 * SIZE


def built(k: int = 2, base: type[torch.optim.Optimizer] = torch.optim.SGD, **settings: object) -> Lookbehind:
    params = [nn.Parameter(torch.ones(SIZE)), nn.Parameter(torch.ones(SIZE))]
    settings = {"lr": 0.1, **({"momentum": 0.9} if base is torch.optim.SGD else {}), **settings}
    return Lookbehind(params, base, k=k, **settings)


def stepped(optimizer: Lookbehind) -> Lookbehind:
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def closure() -> Tensor:
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    optimizer.step(closure)
    return optimizer


def lines(optimizer: object) -> list[str]:
    return [line.strip() for line in repr(optimizer).splitlines()]


# ---- repr ------------------------------------------------------------------------------------------------------------


def test_repr_reads_like_torchs() -> None:
    """What torch prints of the base is in it; before that a line for each setting."""
    optimizer = built(k=3, alpha="adaptive", backend="reference")
    text, of_base = repr(optimizer), repr(optimizer.base_optimizer)
    assert text.startswith("Lookbehind (\n    base_optimizer: SGD\n    backend: reference\n    buckets: none before")
    assert text.endswith(of_base[of_base.index("Parameter Group 0") :])
    for expected in ("k: 3", "alpha: 'adaptive'", "alpha_scope: 'global'", "reuse_gradient: True", "rho: 0.05"):
        assert expected in lines(optimizer)


def test_repr_says_which_backend_auto_is_how_many_buckets_and_what_memory() -> None:
    optimizer = built(k=3)
    assert "backend: auto" in lines(optimizer)
    stepped(optimizer)
    name = "reference" if native.why_not() else "native"
    assert f"backend: auto ({name})" in lines(optimizer)
    assert "buckets: 1" in lines(optimizer)
    extra = sum(optimizer.memory().values()) - optimizer.memory()["state"]
    assert f"extra memory: {extra / 1024:.1f} KiB" in lines(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=torch.float64))]})
    stepped(optimizer)
    assert "buckets: 2" in lines(optimizer)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1, "1 byte"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB")]
)
def test_sizes_in_words(size: int, text: str) -> None:
    assert report.in_words(size) == text


def test_repr_of_methods_and_wrappers() -> None:
    """What a method is made of stands there too."""
    params = [nn.Parameter(torch.ones(2))]
    method = MultistepSAM(params, torch.optim.AdamW, k=4, average=True)
    assert repr(method).startswith("MultistepSAM (\n    base_optimizer: AdamW\n")
    assert "average: True" in lines(method)
    assert repr(Lookahead(method)).startswith("Lookahead(k=5, alpha=0.5, MultistepSAM (\n    base_optimizer: AdamW\n")
    model = nn.Linear(2, 1)
    form = compat.LookbehindSAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert repr(form).startswith("LookbehindSAM(rho=0.5, eta=0.01, optimizer=SGD (\nParameter Group 0\n")


# ---- memory ----------------------------------------------------------------------------------------------------------

COPY = 2 * BYTES


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"k": 1}, {"slow": COPY, "state": COPY}),
        ({"k": 2}, {"slow": COPY, "state": COPY, "working state": COPY}),
        ({"k": 3}, {"slow": COPY, "state": COPY, "working state": COPY, "fast": COPY}),
        (
            {"k": 3, "alpha": "adaptive"},
            {"slow": COPY, "fast": COPY, "first": COPY, "state": COPY, "working state": COPY},
        ),
        ({"k": 2, "microbatches": 2}, {"means": 2 * COPY}),
        ({"k": 1, "ascent_gradient": "previous"}, {"previous gradients": COPY}),
        ({"base": torch.optim.Adam, "k": 1}, {"slow": COPY, "state": 2 * COPY + 2 * 4}),
        ({"base": torch.optim.RMSprop, "k": 1}, {"slow": COPY, "state": COPY + 2 * 4}),
    ],
    ids=str,
)
def test_memory_by_what_it_is_for(settings: dict[str, object], expected: dict[str, int]) -> None:
    """Beside small tables."""
    optimizer = built(**settings)
    assert optimizer.memory() == {}
    if settings.get("microbatches"):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.step(lambda evaluation: sum(p.square().sum() for p in params).backward())
    else:
        stepped(stepped(optimizer))
    found = optimizer.memory()
    assert {name: found.get(name) for name in expected} == expected
    if "slow" in expected:
        assert set(found) - {"fast"} == {*expected, "tables"} - {"fast"}
        assert 0 < found["tables"] < 1024
    assert all(type(size) is int and size for size in found.values())


def test_memory_of_16_bits_and_of_lookahead() -> None:
    optimizer = Lookahead(built(k=1, momentum=0.0))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert optimizer.memory() == {}
    optimizer.step(lambda: sum(p.square().sum() for p in params).backward())
    assert optimizer.memory() == {**optimizer.optimizer.memory(), "slow weights": COPY}
    around_sgd = Lookahead(torch.optim.SGD(params, lr=0.1))
    around_sgd.step()
    assert around_sgd.memory() == {"slow weights": COPY}

    p = nn.Parameter(torch.ones(SIZE, dtype=torch.bfloat16))
    rounded = stepped(Lookbehind([p], torch.optim.SGD, lr=0.1, k=1))
    assert rounded.memory()["perturbed"] == rounded.memory()["slow"] == BYTES


def test_an_optimizer_that_was_refused_can_be_looked_at() -> None:
    """Its buckets are made, and bound for nothing."""
    optimizer = stepped(built())
    optimizer._prepared.buckets[0].key = None
    assert optimizer.memory()["slow"] == COPY
    assert "buckets: 1" in lines(optimizer)


def test_memory_is_that_of_storages() -> None:
    """No part of the buffers of a real model is left out: their sizes with the padding."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 11))
    optimizer = stepped(Lookbehind(model.parameters(), torch.optim.AdamW, k=3, alpha="adaptive"))
    buffers = [x for bucket in optimizer._prepared.buckets for x in bucket.buffers.values()]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in buffers}
    found = optimizer.memory()
    steps = 4 * len(optimizer.param_groups[0]["params"])
    assert sum(found.values()) - found["tables"] - steps == sum(held.values())


# ---- backends and versions -------------------------------------------------------------------------------------------


def test_show_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert lookbehind_fused.show_backends() is None
    text = capsys.readouterr().out
    for expected in (
        f"lookbehind_fused {lookbehind_fused.__version__}",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"CUDA {torch.version.cuda or 'none'}",
        "device cpu",
    ):
        assert expected in text
    for i in range(torch.cuda.device_count()):
        assert torch.cuda.get_device_name(i) in text
    for name, module in kernels.BACKENDS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert module.DEVICES in line
        assert line.endswith("available" if module.why_not() is None else f"{module.why_not()}; {module.REMEDY}")


def test_show_backends_says_why_not_and_the_way_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "unavailable", "_native.abi3.so was not built when the package was installed")
    monkeypatch.setattr(triton, "why_not", lambda: "triton is not installed")
    lookbehind_fused.show_backends()
    text = capsys.readouterr().out
    assert f"_native.abi3.so was not built when the package was installed; {native.REMEDY}" in text
    assert f"triton is not installed; {triton.REMEDY}" in text
    assert "'auto' takes reference on cpu" in text


def test_the_version_is_that_of_the_installed_metadata() -> None:
    assert lookbehind_fused.__version__ == importlib.metadata.version("lookbehind-fused")


def test_without_metadata_the_version_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ``make gpu-check PYTHON=...`` builds in place."""

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert report.version() == "unknown (not installed)"
