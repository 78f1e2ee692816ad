"""The contract between Python, Triton, CUDA and C++: a number that is changed on one side alone does not go unnoticed.

CUDA's kernels have the numbers of ``csrc/contract.h``, as C++'s do.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from lookbehind_fused.kernels import SCHEMAS, RuleId, contract, native
from lookbehind_fused.kernels.contract import NUMBERS, Column, Flag, Hyper
from tests.kernels.mutants import MISSING, ROOT, assert_noticed, cases_of, copied_to, mutate

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
        "INLINED", *(f"{rule.name}: {what}" for rule in RuleId for what in ("numbers", "buffers"))
    }  # fmt: skip
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


# ---- mutants: one number is another in one language alone ------------------------------------------------------------

# What csrc/contract.h says, what it says instead, the entry that differs first and is to be named.
IN_CPP = {
    **{
        f"{name} = {value},": (f"{name} = 128,", f"Flag.{entry}")
        for name, value, entry in [
            ("kAdaptive", 1, "ADAPTIVE"),
            ("kPerTensor", 2, "PER_TENSOR"),
            ("kMaximize", 4, "MAXIMIZE"),
            ("kNesterov", 8, "NESTEROV"),
            ("kDecoupled", 16, "DECOUPLED"),
            ("kDerives", 32, "DERIVES"),
        ]
    },
    "kSkips = 64": ("kSkips = 128", "Flag.SKIPS"),
    "{ none, sgd,": ("{ sgd, none,", "RuleId.NONE"),
    "sgd, momentum, adam": ("momentum, sgd, adam", "RuleId.SGD"),
    "momentum, adam, amsgrad": ("adam, momentum, amsgrad", "RuleId.MOMENTUM"),
    "adam, amsgrad }": ("amsgrad, adam }", "RuleId.ADAM"),
    "{ kRho, kEta,": ("{ kEta, kRho,", "Hyper.RHO"),
    "kEta, kAlpha,": ("kAlpha, kEta,", "Hyper.ETA"),
    "kAlpha, kMaxGradNorm,": ("kMaxGradNorm, kAlpha,", "Hyper.ALPHA"),
    "kMaxGradNorm, kUnscale,": ("kUnscale, kMaxGradNorm,", "Hyper.MAX_GRAD_NORM"),
    "kUnscale, kOfRule }": ("kUnscale, kOther, kOfRule }", "Hyper.OF_RULE"),
    "kSgdLr = kOfRule, kSgdMomentum,": ("kSgdMomentum = kOfRule, kSgdLr,", "SGD.lr"),
    "kSgdMomentum, kSgdDampening,": ("kSgdDampening, kSgdMomentum,", "SGD.momentum"),
    "kSgdDampening, kSgdWeightDecay,": ("kSgdWeightDecay, kSgdDampening,", "SGD.dampening"),
    "kAdamLr = kOfRule, kAdamBeta1,": ("kAdamBeta1 = kOfRule, kAdamLr,", "ADAM.lr"),
    "kAdamBeta1, kAdamBeta2,": ("kAdamBeta2, kAdamBeta1,", "ADAM.beta1"),
    "kAdamBeta2, kAdamEps,": ("kAdamEps, kAdamBeta2,", "ADAM.beta2"),
    "kAdamEps, kAdamWeightDecay,": ("kAdamWeightDecay, kAdamEps,", "ADAM.eps"),
    "{ kRow, kStart,": ("{ kStart, kRow,", "Column.ROW"),
    "kStart, kSize,": ("kSize, kStart,", "Column.START"),
    "kSize, kGroup,": ("kGroup, kSize,", "Column.SIZE"),
    "kGroup, kAddress,": ("kAddress, kGroup,", "Column.GROUP"),
    "kAddress, kSizes }": ("kSizes, kAddress }", "Column.ADDRESS"),
    "{1, kSgdEnd - kOfRule}": ("{2, kSgdEnd - kOfRule}", "MOMENTUM: buffers"),
    "{2, kAdamEnd - kOfRule}": ("{2, kAdamEnd - kAdamBeta1}", "ADAM: numbers"),
    "{3, kAdamEnd - kOfRule}": ("{2, kAdamEnd - kOfRule}", "AMSGRAD: buffers"),
}


def built_and_imported(folder: Path) -> subprocess.CompletedProcess:
    """A copy of the package whose library has the contract of the copy of csrc and nothing else."""
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # setup.py's
    options = ["-std=c++17", "-O0", "-fPIC", "-shared", "-fvisibility=hidden", target]
    options += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    library = folder / "lookbehind_fused" / native.LIBRARY.name
    library.unlink()
    source = str(folder / "csrc" / "contract.cpp")
    subprocess.run(["g++", *options, source, "-o", str(library), "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    code = "import lookbehind_fused.kernels.native as native; print(native.__file__)"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


@needs_library
@needs_compiler
def test_a_library_of_these_sources_is_taken(tmp_path: Path) -> None:
    """The libraries below are refused for what was changed in them and for nothing else."""
    done = built_and_imported(copied_to(tmp_path, "lookbehind_fused", "csrc"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "lookbehind_fused" / "kernels" / "native.py")


@needs_library
@needs_compiler
@pytest.mark.sample(4)
@pytest.mark.parametrize("before", IN_CPP)
def test_a_library_with_another_number_is_refused(before: str, tmp_path: Path) -> None:
    """When it is loaded, by the name of what differs."""
    after, entry = IN_CPP[before]
    mutate(copied_to(tmp_path, "lookbehind_fused", "csrc") / "csrc" / "contract.h", before, after)
    done = built_and_imported(tmp_path)
    assert done.returncode == 1, done.stdout
    assert f"was built from other sources than this package's: {entry}: expected " in done.stderr, done.stderr


# The Triton kernels have no numbers of their own: what they can do is take another entry for the one they mean.
IN_TRITON = {
    "= _known(Flag.MAXIMIZE, Flag.NESTEROV, Flag.DECOUPLED)": (
        "= _known(Flag.NESTEROV, Flag.MAXIMIZE, Flag.DECOUPLED)",
        "descend",
    ),
    "Flag.NESTEROV, Flag.DECOUPLED)": ("Flag.DECOUPLED, Flag.NESTEROV)", "descend"),
    "_known(RuleId.SGD, RuleId.MOMENTUM,": ("_known(RuleId.MOMENTUM, RuleId.SGD,", "descend"),
    "RuleId.MOMENTUM, RuleId.ADAM,": ("RuleId.ADAM, RuleId.MOMENTUM,", "descend"),
    "RuleId.ADAM, RuleId.AMSGRAD)": ("RuleId.AMSGRAD, RuleId.ADAM)", "descend"),
    "_known(Column.ROW, Column.START,": ("_known(Column.START, Column.ROW,", "ascend"),
    "Column.START, Column.SIZE,": ("Column.SIZE, Column.START,", "ascend"),
    "Column.SIZE, Column.GROUP,": ("Column.GROUP, Column.SIZE,", "ascend"),
    "_known(Hyper.RHO, Hyper.ETA,": ("_known(Hyper.ETA, Hyper.RHO,", "ascend"),
    "Hyper.ETA, Hyper.ALPHA)": ("Hyper.ALPHA, Hyper.ETA)", "ascend,descend_interpolate"),
    "_known(Hyper.MAX_GRAD_NORM, Hyper.UNSCALE)": ("_known(Hyper.UNSCALE, Hyper.MAX_GRAD_NORM)", "descend"),
    '"lr", "momentum", "dampening"': ('"momentum", "lr", "dampening"', "descend"),
    '"momentum", "dampening", "weight_decay"': ('"dampening", "momentum", "weight_decay"', "descend"),
    '"dampening", "weight_decay"': ('"weight_decay", "dampening"', "descend"),
    '"lr", "beta1", "beta2"': ('"beta1", "lr", "beta2"', "descend"),
    '"beta1", "beta2", "eps"': ('"beta2", "beta1", "eps"', "descend"),
    '"beta2", "eps", "weight_decay"': ('"eps", "beta2", "weight_decay"', "descend"),
    '"eps", "weight_decay"': ('"weight_decay", "eps"', "descend"),
}


@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} on PYTHONPATH")
@pytest.mark.sample(1)
@pytest.mark.parametrize("before", IN_TRITON)
def test_triton_kernels_that_take_another_number_are_noticed(before: str, tmp_path: Path) -> None:
    """By the table of passes, without a GPU; that it passes without a change, test_triton shows."""
    after, passes = IN_TRITON[before]
    folder = copied_to(tmp_path, "lookbehind_fused", "tests", "benchmarks")
    mutate(folder / "lookbehind_fused" / "kernels" / "triton_kernels.py", before, after)
    where = "sm90" if "Column" in before else "interpreter"  # which would access memory anywhere
    options = [where, "--passes", passes, "--sample", "3"]
    assert_noticed(cases_of(folder, "tests.kernels.triton_cases", options))


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
