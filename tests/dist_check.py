"""`make dist-check`: a source archive, installed into new environments, with a compiler and without.

Prints what each archive holds and how long each installation took; any surprise is an AssertionError. It takes minutes,
so it is no part of `make test`.
"""

import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from tests.installing import LIBRARY, ROOT, Environment, copy_sources, has_nvcc

STEP = """
import warnings
import torch
import lookbehind_fused
from lookbehind_fused.kernels import native

assert lookbehind_fused.__file__.startswith({site!r}), lookbehind_fused.__file__
p = torch.nn.Parameter(torch.ones(5))

def closure():
    loss = p.square().sum()
    loss.backward()
    return loss

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        optimizer = lookbehind_fused.Lookbehind([p], torch.optim.SGD, lr=0.1, momentum=0.9, backend={backend!r})
        optimizer.step(closure)
assert bool((p < 0.9).all()), p
print(len(caught), *(w.message for w in caught))
"""


class Borrowing(Environment):
    """A new environment that sees this one's torch, setuptools and ninja, but not this package."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pip("uninstall", "-q", "-y", "setuptools", check=False)  # Python 3.11 and older bring an old one along
        shared = self.site / "shared"
        shared.mkdir()
        mine = re.compile(r"lookbehind|__editable__|distutils-precedence|_virtualenv|\.pth$")
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not mine.search(entry.name) and not (self.site / entry.name).exists():
                (shared / entry.name).symlink_to(entry)
        (self.site / "shared.pth").write_text(f"{shared}\n")

    def warnings_of_a_step(self, backend: str) -> str:
        """How many warnings two optimizers give, and what they say."""
        return self.run("-c", STEP.format(site=str(self.site), backend=backend)).stdout.strip()


def timed(what: str, started: float) -> None:
    print(f"{what}: {time.monotonic() - started:.0f} s", flush=True)


def source_archive(folder: Path) -> Path:
    """The archive, made from a copy of what git tracks or would track."""
    copy_sources(folder / "source")
    code = "from setuptools.build_meta import build_sdist; import sys; build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= names, sources - names
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names
    strays = [name for name in names if re.search(r"\.(so|o|pyc)$|__pycache__|^benchmarks/", name)]
    assert not strays, strays
    print(f"{archive.name}: {len(names)} entries, {archive.stat().st_size / 1e3:.0f} kB")
    return archive


def check_wheel(wheel: Path, *, has_library: bool) -> None:
    """The package's modules, that they have types, its library, the licence, metadata, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lookbehind_fused").rglob("*.py")}
    info = {name for name in names if ".dist-info/" in name}
    expected = modules | {"lookbehind_fused/py.typed"} | ({LIBRARY} if has_library else set())
    assert names - info == expected, (names - info) ^ expected
    assert {name.partition(".dist-info/")[2] for name in info} == {
        "METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt"
    }  # fmt: skip
    print(f"{wheel.name}: {len(names)} entries, {wheel.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    """Build the archive, then install it three ways."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = source_archive(folder)
        install = ("install", "--no-build-isolation", "--no-deps", "--no-cache-dir", str(archive))
        nothing = {"CXX": str(folder / "missing"), "CC": str(folder / "missing")}

        started = time.monotonic()
        full = Borrowing(folder / "full")
        (folder / "wheels").mkdir()
        full.pip("wheel", *install[1:], "--wheel-dir", str(folder / "wheels"))
        (wheel,) = (folder / "wheels").glob("*.whl")
        check_wheel(wheel, has_library=True)
        timed("wheel from the archive", started)
        started = time.monotonic()
        full.pip(*install)
        assert full.warnings_of_a_step("native") == "0"
        assert full.warnings_of_a_step("auto") == "0"
        why_not = full.run("-c", "from lookbehind_fused.kernels import cuda; print(cuda.why_not())").stdout.strip()
        assert (why_not == "None") == has_nvcc(), why_not
        timed("installed from the archive, steps on native", started)

        started = time.monotonic()
        bare = Borrowing(folder / "bare")
        refused = bare.pip(*install, check=False, **nothing)
        assert refused.returncode != 0, "installed without a compiler, unasked"
        for said in (f"there is no C++ compiler '{nothing['CXX']}'", "g++", "LOOKBEHIND_NATIVE=0"):
            assert said in refused.stdout + refused.stderr, refused.stderr
        nothing["LOOKBEHIND_NATIVE"] = "0"
        bare.pip(*install, **nothing)
        warned = bare.warnings_of_a_step("auto")
        assert warned.startswith("1 backend 'auto' uses the slower 'reference'"), warned
        assert "was not built" in warned
        assert bare.warnings_of_a_step("reference") == "0"
        (folder / "wheels without").mkdir()
        bare.pip("wheel", *install[1:], "--wheel-dir", str(folder / "wheels without"), **nothing)
        (wheel,) = (folder / "wheels without").glob("*.whl")
        check_wheel(wheel, has_library=False)
        timed(
            "refused without a compiler; asked for no kernels, installed, steps on the reference, warns once", started
        )


if __name__ == "__main__":
    main()
