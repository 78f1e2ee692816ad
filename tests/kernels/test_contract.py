"""The contract between Python, Triton, CUDA and C++: a number that is changed on one side alone does not go unnoticed.

CUDA's kernels have the numbers of ``csrc/contract.h``, as C++'s do.
"""

import re

import pytest
import torch

from lookbehind_fused.kernels import SCHEMAS, RuleId, contract, native
from lookbehind_fused.kernels.contract import NUMBERS, Column, Flag, Hyper
from tests.kernels.mutants import ROOT

needs_library = pytest.mark.skipif(native.why_not() is not None, reason=f"no native library: {native.why_not()}")
ENTRIES = contract.entries()


def lines(entries: dict[str, int]) -> str:
    """As a library gives its entries."""
    return "".join(f"{name} {value}\n" for name, value in entries.items())


def test_every_number_is_in_the_contract() -> None:
    """Of each table each entry, and of each rule where its own numbers are."""
    named = {f"{table.__name__}.{entry.name}" for table in (Flag, RuleId, Hyper, Column) for entry in table}
    own = {f"{rule.name}.{name}" for rule in RuleId for name in NUMBERS[rule]}
    assert {name for name in ENTRIES if "." in name} == named | own
    assert {name for name in ENTRIES if "." not in name} == {
        f"{rule.name}: {what}" for rule in RuleId for what in ("numbers", "buffers")
    }
    assert ENTRIES["ADAM.beta2"] == Hyper.OF_RULE + 2
    assert len({int(flag) for flag in Flag}) == len(Flag)
    assert all(flag.bit_count() == 1 for flag in map(int, Flag))


@needs_library
def test_the_library_has_the_contract_of_this_package() -> None:
    """Entry by entry: the op says so, and nothing more."""
    found = dict(line.rsplit(" ", 1) for line in torch.ops.lookbehind_fused.contract().splitlines())
    assert {name: int(value) for name, value in found.items()} == ENTRIES


@pytest.mark.parametrize("name", ENTRIES)
def test_a_different_number_is_named(name: str) -> None:
    """With what was expected and what came; also one that is missing."""
    value = ENTRIES[name]
    assert native._difference(lines({**ENTRIES, name: value + 1})) == f"{name}: expected {value}, got {value + 1}"
    without = {key: number for key, number in ENTRIES.items() if key != name}
    assert native._difference(lines(without)) == f"{name}: expected {value}, got None"


def test_agreement_is_no_difference() -> None:
    """In any order; an entry too many is one."""
    assert native._difference(lines(ENTRIES)) == ""
    assert native._difference(lines(dict(reversed(ENTRIES.items())))) == ""
    assert native._difference(lines({**ENTRIES, "Flag.OTHER": 128})) == "Flag.OTHER: expected None, got 128"


@needs_library
def test_a_library_without_a_contract_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was built before there was one: it would read arguments for what they are not."""
    monkeypatch.setattr(native, "_has_contract", lambda: False)
    with pytest.raises(RuntimeError, match=r"other sources than this package's: Flag.ADAPTIVE: expected 1, got None"):
        native._load()


def test_no_place_in_hyper_or_table_is_a_literal() -> None:
    """Neither in C++ nor in CUDA: there the names of the contract stand."""
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.name not in ("contract.h", "contract.cpp")]
    assert len(sources) > 10
    for path in sources:
        found = re.findall(r"\b(?:hyper|of_tensor|n|h)\[\d+\]", path.read_text())
        assert not found, f"{path.name}: {found}"


def test_the_ops_take_rules_as_numbers() -> None:
    """A string argument leaks in the stable ABI of torch 2.10 and later."""
    assert not [name for name, schema in SCHEMAS.items() if re.search(r"\bstr\b", schema)]
