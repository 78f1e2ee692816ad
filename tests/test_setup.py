"""What setup.py decides: a library that cannot be built ends the installation, in words that say the ways out.

Each test runs setup.py in a folder of its own, with sources that nothing compiles and stubs in the place of compilers.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path("lookbehind_fused", "_native.abi3.so")


class Project:
    """A copy of what setup.py needs. ``stubs`` is all of its PATH, if nothing is said; ``calls``: which stubs ran."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stubs, self.calls = folder / "project", folder / "stubs", folder / "calls"
        for name in ("csrc/cpu", "csrc/cuda", "lookbehind_fused"):
            (self.folder / name).mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            (self.folder / name).write_bytes((ROOT / name).read_bytes())
        (self.folder / "lookbehind_fused" / "__init__.py").touch()
        for name in ("contract.cpp", "cuda/kernels_f32.cu", "cuda/ops.cpp"):
            (self.folder / "csrc" / name).write_text("#error not to be compiled\n")
        self.stubs.mkdir()
        self.calls.touch()

    def stub(self, path: str, says: str) -> Path:
        """A compiler that notes its calls and says its version; where it is to compile it fails, in other words."""
        target = self.stubs / path
        target.parent.mkdir(parents=True, exist_ok=True)
        fails = f'case "$*" in *-c\\ *) echo {says} >&2; exit 3;; esac'
        target.write_text(f"#!/bin/sh\necho {path} >> {self.calls}\n{fails}\necho gcc version 12.2.0\n")
        target.chmod(0o755)
        return target

    def setup(self, *command: str, **variables: str) -> subprocess.CompletedProcess:
        chosen = ("CC", "CXX", "CUDA_HOME", "LOOKBEHIND_NATIVE", "PATH")
        environment = {name: value for name, value in os.environ.items() if name not in chosen}
        environment |= {"PATH": str(self.stubs), "PYTHONWARNINGS": "ignore", **variables}
        command = (sys.executable, "setup.py", "-q", *(command or ("build_ext", "--inplace")))
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def assert_refused(done: subprocess.CompletedProcess, project: Project, reason: str) -> None:
    assert done.returncode != 0
    assert re.search(rf"^lookbehind_fused: its native kernels were not built: .*{reason}", done.stderr, re.M), (
        done.stderr
    )
    for way_out in ("install a C++17 compiler (g++", "CUDA_HOME=none", "LOOKBEHIND_NATIVE=0"):
        assert way_out in done.stderr, done.stderr
    assert not (project.folder / LIBRARY).exists()


@pytest.mark.parametrize(("variables", "name"), [({}, "'c\\+\\+'"), ({"CXX": "g++-99 -m64"}, "'g\\+\\+-99'")])
def test_without_a_compiler_the_error_names_it_and_both_ways_out(project, variables, name) -> None:
    assert_refused(project.setup(**variables), project, f"there is no C\\+\\+ compiler {name}")


def test_a_compiler_that_fails_ends_the_installation(project) -> None:
    compiler = str(project.stub("c++", "stub: no memory left"))
    done = project.setup(CXX=compiler, CC=compiler, CUDA_HOME="none", PATH=os.environ["PATH"])
    assert_refused(done, project, "")
    assert "c++" in project.calls.read_text().split()
    assert "stub: no memory left" in done.stdout + done.stderr


@pytest.mark.parametrize("named", [False, True], ids=["on the path", "in CUDA_HOME"])
def test_a_cuda_toolkit_that_fails_ends_the_installation(project, named: bool) -> None:
    """Where there is one, kernels for CPUs alone are not what was asked for."""
    project.stub("c++", "stub: not to be asked yet")
    project.stub("cuda/bin/nvcc" if named else "nvcc", "stub: unsupported host")
    done = project.setup(**({"CUDA_HOME": str(project.stubs / "cuda")} if named else {}))
    assert_refused(done, project, "kernels_f32.cu.*exit status 3")
    assert "stub: unsupported host" in done.stderr
    assert "alone" not in done.stderr


@pytest.mark.parametrize(("variables", "name"), [({}, "nvcc"), ({"CUDA_HOME": "none"}, "none/bin/nvcc")])
def test_without_a_cuda_toolkit_one_line_says_so(project, variables, name: str) -> None:
    """What is built then is all that was asked for: a CUDA_HOME without one leaves out that of the path."""
    compiler = str(project.stub("c++", "stub: no memory left"))
    if variables:
        project.stub("nvcc", "stub: not to be asked")
    done = project.setup(CXX=compiler, CC=compiler, **variables)
    said = [line for line in done.stderr.splitlines() if "CUDA toolkit (" in line]
    assert said == [f"lookbehind_fused: no CUDA toolkit ({name}): kernels for CPUs alone"]
    assert "nvcc" not in project.calls.read_text().split()


def test_none_are_built_where_none_are_asked_for(project) -> None:
    for name in ("c++", "nvcc"):
        project.stub(name, "stub: not to be asked")
    done = project.setup(LOOKBEHIND_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert project.calls.read_text() == ""
    assert not (project.folder / LIBRARY).exists()


def test_a_setuptools_that_makes_no_wheels_is_refused_in_words(project) -> None:
    """A new environment of Python 3.10 has such a one. Here it is this one, of which nobody finds the command."""
    (project.folder / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "hidden = ('wheel', 'setuptools.command.bdist_wheel')\n"
        "importlib.util.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)\n"
    )
    done = project.setup("dist_info", PYTHONPATH=str(project.folder))
    assert done.returncode != 0
    assert re.search(r"setuptools [\d.]+ makes no wheels: pip install 'setuptools>=77.0.3' first", done.stderr), (
        done.stderr
    )
    assert project.setup("dist_info").returncode == 0


def test_the_library_is_built_for_the_oldest_torch_that_is_allowed() -> None:
    (built_for,) = re.findall(r"DTORCH_TARGET_VERSION=0x\{(\d+):02x\}\{(\d+):02x\}", (ROOT / "setup.py").read_text())
    allowed = re.findall(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert allowed == [built_for, built_for]  # to build, and to run
