"""What `make wheel` decides; the wheels themselves take minutes and are no part of this."""

from pathlib import Path

import pytest

from tests.wheel import kinds_of, left_in, pairs_of, tag_of

FOUND = {
    "external_libs": {"libc10.so": None, "libtorch_cpu.so": None},
    "unsupported_isa": False,
    "sym_tag": "manylinux_2_24_x86_64",
    "versioned_symbols": {"libc.so.6": ["GLIBC_2.14"]},
}


@pytest.mark.parametrize("tag", ["manylinux_2_24_x86_64", "manylinux_2_28_x86_64"])
def test_the_tag_is_that_of_the_symbols(tag: str) -> None:
    assert tag_of(FOUND | {"sym_tag": tag}) == tag


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"sym_tag": "manylinux_2_31_x86_64", "versioned_symbols": {"libm.so.6": ["GLIBC_2.29"]}}, "2_31.*GLIBC_2.29"),
        ({"sym_tag": "linux_x86_64"}, "^linux_x86_64"),
        ({"external_libs": {"libc10.so": None, "libtorch_cpu.so": None, "libcudart.so.13": None}}, "libcudart.so.13"),
        ({"external_libs": {"libc10.so": None}}, "libc10"),
        ({"unsupported_isa": True}, "instructions"),
    ],
    ids=["newer glibc", "no manylinux", "another library", "no torch", "instructions"],
)
def test_a_wheel_that_needs_more_than_torch_does_is_refused(other: dict, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        tag_of(FOUND | other)


@pytest.mark.parametrize(
    ("cpu", "cuda", "has_nvcc", "expected"),
    [
        (False, False, False, ["cpu"]),
        (False, False, True, ["cpu", "cuda"]),
        (True, False, True, ["cpu"]),
        (False, True, True, ["cuda"]),
        (True, True, True, ["cpu", "cuda"]),
    ],
)
def test_what_is_built(cpu: bool, cuda: bool, has_nvcc: bool, expected: list[str]) -> None:
    assert kinds_of(cpu, cuda, has_nvcc) == expected


def test_where_they_are_installed() -> None:
    assert pairs_of(None, None) == [("3.10", "2.10"), ("3.13", "newest")]
    assert pairs_of(["3.12"], None) == [("3.12", "2.10"), ("3.12", "newest")]
    assert pairs_of(None, ["2.12"]) == [(f"3.{minor}", "2.12") for minor in (10, 11, 12, 13)]
    assert pairs_of(["3.11"], ["2.11"]) == [("3.11", "2.11")]


def test_wheels_of_an_earlier_call_are_found_by_kind(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"expected cpu/\*\.whl or cuda/\*\.whl, found none"):
        left_in(tmp_path, ["cpu", "cuda"])
    for kind in ("cpu", "cuda"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "some.whl").touch()
    assert left_in(tmp_path, ["cpu", "cuda"]) == {kind: tmp_path / kind / "some.whl" for kind in ("cpu", "cuda")}
    assert left_in(tmp_path, ["cuda"]) == {"cuda": tmp_path / "cuda" / "some.whl"}
