"""`make matrix`: on each torch and each Python the package is built, loaded and steps as the reference does.

Each combination has an environment of its own, deleted after it: a torch that comes with CUDA takes several GB.
A row says how it went as it ends; any that fails, or a torch that no Python found here has, is an error at the end.
By default each torch meets the oldest Python, and the oldest and the newest torch every Python.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.installing import LIBRARY, ROOT, Absent, Environment, copy_sources, has_nvcc

TORCHES = ("2.10", "2.11", "2.12", "2.13", "newest")  # what pip takes where no version is named
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NEEDED_BY_TESTS = ("hypothesis", "numpy", "pytest", "pytest-benchmark", "pytest-xdist")
TESTS = ("kernels/test_native.py", "test_algorithm1.py", "test_checkpoint.py", "test_compile.py", "test_optimizer.py")


def interpreters(wanted: list[str]) -> dict[str, Path]:
    """Of each version the first that makes environments: on the path, of pyenv, of the distribution."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = {}
    for version in wanted:
        on_path = [Path(path) for path in [shutil.which(f"python{version}")] if path]
        for path in [
            *on_path,
            *sorted(pyenv.glob(f"versions/{version}.*/bin/python3")),
            Path(f"/usr/bin/python{version}"),
        ]:
            code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
            try:
                done = subprocess.run([str(path), "-c", code], capture_output=True, text=True)
            except OSError:
                continue
            if done.returncode == 0 and done.stdout.strip() == version:
                found[version] = path
                break
        else:
            print(f"Python {version}: none found that makes environments", flush=True)
    return found


def chosen(torches: list[str], pythons: list[str], every: bool) -> list[tuple[str, str]]:
    """The combinations, one Python after the other; the newest torch first, whose library is tried on the others."""
    ends = (torches[0], torches[-1])
    return [(t, p) for p in pythons for t in reversed(torches) if every or t in ends or p == pythons[0]]


class Matrix:
    """What the combinations share: one copy of the sources, the kernels for GPUs, the library of the first of them.

    Args:
        folder: for the sources and one environment at a time.
        tests: files and options, as pytest takes them.
        tested: the torches on which tests run.
    """

    def __init__(self, folder: Path, tests: list[str], tested: set[str]) -> None:
        self.folder, self.source, self.tests, self.tested = folder, folder / "source", tests, tested
        copy_sources(self.source)
        # One folder for all: what includes no torch is compiled once, the kernels for CPUs once for each Python.
        (self.source / "setup.cfg").write_text("[build_ext]\nbuild_temp = build/temp\n")
        self.has_cuda = has_nvcc()
        self.first: tuple[str, Path] | None = None

    def row(self, torch: str, python: Path) -> str:
        """One combination; what is to be said of it.

        Raises:
            Absent: there is no such torch.
            AssertionError: something failed; what was printed then.
        """
        folder = self.folder / "environment"  # the same for all, as it is part of the compiler's command lines
        try:
            environment = Environment(folder, python)
            environment.install_torch(torch)
            parts = self.build(environment)
            torch_version, cuda, worst = environment.smoke(self.has_cuda)
            parts = [
                f"torch {torch_version}, CUDA: {cuda}",
                *parts,
                f"steps as the reference ({worst} of the tolerance)",
            ]
            if torch in self.tested:
                parts.append(self.run_tests(environment))
            if self.first is None:
                self.first = torch_version, self.folder / "first.so"
                shutil.copyfile(environment.site / LIBRARY, self.first[1])
            else:
                shutil.copyfile(self.first[1], environment.site / LIBRARY)
                environment.smoke(self.has_cuda)
                parts.append(f"the library built with {self.first[0]} too")
            return "; ".join(parts)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def build(self, environment: Environment) -> list[str]:
        """Build and install the package, with the setuptools that is there if that can be."""
        for path in self.source.glob("build/*"):
            if path.name != "temp":
                shutil.rmtree(path)
        for pattern in ("csrc/*.o", "csrc/cuda/*.o"):  # of sources that include torch
            for path in self.source.joinpath("build", "temp").glob(pattern):
                path.unlink()
        parts = []
        install = ("install", "-q", "--no-build-isolation", "--no-deps", "--no-cache-dir", str(self.source))
        if not self.makes_wheels(environment):
            there = environment.run("-c", "import setuptools; print(setuptools.__version__)").stdout.strip()
            environment.run("setup.py", "-q", "build_ext", "--inplace", cwd=self.source)
            (self.source / LIBRARY).unlink()
            refused = environment.pip(*install, check=False)
            assert refused.returncode != 0, "setuptools without wheels made one"
            assert f"setuptools {there} makes no wheels: pip install 'setuptools" in refused.stdout + refused.stderr, (
                refused
            )
            parts.append(f"setuptools {there} builds in place, and refuses a wheel")
            environment.pip("install", "-q", "--no-cache-dir", "setuptools>=77.0.3,<82")
        environment.pip(*install)
        return [*parts, "built for CPUs and CUDA GPUs" if self.has_cuda else "built for CPUs, without nvcc"]

    def makes_wheels(self, environment: Environment) -> bool:
        """Whether pip can install with the setuptools that a new environment and torch bring along."""
        code = "from importlib.util import find_spec as f; print(f('setuptools.command.bdist_wheel') or f('wheel'))"
        done = environment.run("-c", code, check=False)
        if "No module named 'setuptools'" in done.stderr:
            environment.pip("install", "-q", "--no-cache-dir", "setuptools>=77.0.3")
            return True
        return done.stdout.strip() != "None"

    def run_tests(self, environment: Environment) -> str:
        environment.pip("install", "-q", "--no-cache-dir", "-c", str(ROOT / "constraints.txt"), *NEEDED_BY_TESTS)
        library = self.source / LIBRARY
        shutil.copyfile(environment.site / LIBRARY, library)
        try:
            done = environment.run("-m", "pytest", *self.tests, check=False, cwd=self.source, OMP_WAIT_POLICY="PASSIVE")
        finally:
            library.unlink()
        assert done.returncode == 0, done.stdout + done.stderr
        return re.sub(r" in [\d.]+s.*", "", done.stdout.strip().splitlines()[-1])


def main() -> int:
    """Go through the combinations, a row for each; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("tests", nargs="*", help="more files of tests than the chosen, as tests/test_family.py")
    parser.add_argument("--torch", nargs="+", default=TORCHES, help=f"the oldest first; {' '.join(TORCHES)}")
    parser.add_argument("--python", nargs="+", default=PYTHONS, help=" ".join(PYTHONS))
    parser.add_argument("--every", action="store_true", help="every torch on every Python")
    parser.add_argument("--most", type=int, default=20, help="cases of one test, on the oldest and newest torch")
    options = parser.parse_args()
    torches, found = list(options.torch), interpreters(options.python)
    if not found:
        parser.error(f"--python: expected a Python of which an interpreter is found, got {' '.join(options.python)}")
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")  # which GPUs the kernels are for is no matter of torch's
    tests = [*(f"tests/{name}" for name in TESTS), *options.tests]
    failed, built = [], set()
    with tempfile.TemporaryDirectory() as name:
        matrix = Matrix(Path(name), [*tests, "--most", str(options.most)], {torches[0], torches[-1]})
        for torch, version in chosen(torches, list(found), options.every):
            started, what = time.monotonic(), f"torch {torch}, Python {version}"
            try:
                said = matrix.row(torch, found[version])
                built.add(torch)
            except Absent:
                said = "pip has none"
            except (AssertionError, subprocess.CalledProcessError) as error:
                failed.append(what)
                said = "FAILED\n" + "\n".join(str(error).splitlines()[-60:])
            print(f"{what}, {time.monotonic() - started:.0f} s: {said}", flush=True)
    failed += [f"torch {torch} on no Python" for torch in torches if torch not in built]
    if failed:
        print(f"failed: {'; '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
