"""`make dist-check`: a source archive, installed into new environments, with a compiler and without.

Prints what each archive holds and how long each installation took; any surprise is an AssertionError. It takes minutes,
so it is no part of `make test`.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "lookbehind_fused/_native.abi3.so"

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


class Environment:
    """A new virtual environment that sees this one's torch, setuptools and ninja, but not this package."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self.python = folder / "bin" / "python"
        self.pip("uninstall", "-q", "-y", "setuptools", check=False)  # Python 3.11 and older bring an old one along
        self.site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        shared = self.site / "shared"
        shared.mkdir()
        mine = re.compile(r"lookbehind|__editable__|distutils-precedence|_virtualenv|\.pth$")
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not mine.search(entry.name) and not (self.site / entry.name).exists():
                (shared / entry.name).symlink_to(entry)
        (self.site / "shared.pth").write_text(f"{shared}\n")

    def run(self, *arguments: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS")}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # ninja
        command = [str(self.python), *arguments]
        done = subprocess.run(
            command, cwd=self.python.parent, env=environment | variables, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def pip(self, *arguments: str, **options: str | bool) -> subprocess.CompletedProcess:
        return self.run("-m", "pip", "--disable-pip-version-check", *arguments, **options)

    def warnings_of_a_step(self, backend: str) -> str:
        """How many warnings two optimizers give, and what they say."""
        return self.run("-c", STEP.format(site=str(self.site), backend=backend)).stdout.strip()


def timed(what: str, started: float) -> None:
    print(f"{what}: {time.monotonic() - started:.0f} s", flush=True)


def source_archive(folder: Path) -> Path:
    """The archive, made from a copy of what git tracks or would track."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")):
        source, target = ROOT / os.fsdecode(name), folder / "source" / os.fsdecode(name)
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
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
    """The package's modules, its library, the licence, metadata, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lookbehind_fused").rglob("*.py")}
    info = {name for name in names if ".dist-info/" in name}
    expected = modules | ({LIBRARY} if has_library else set())
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
        full = Environment(folder / "full")
        (folder / "wheels").mkdir()
        full.pip("wheel", *install[1:], "--wheel-dir", str(folder / "wheels"))
        (wheel,) = (folder / "wheels").glob("*.whl")
        check_wheel(wheel, has_library=True)
        timed("wheel from the archive", started)
        started = time.monotonic()
        full.pip(*install, LOOKBEHIND_REQUIRE_NATIVE="1")
        assert full.warnings_of_a_step("native") == "0"
        assert full.warnings_of_a_step("auto") == "0"
        why_not = full.run("-c", "from lookbehind_fused.kernels import cuda; print(cuda.why_not())").stdout.strip()
        assert (why_not == "None") == bool(shutil.which("nvcc")), why_not
        timed("installed from the archive, steps on native", started)

        started = time.monotonic()
        bare = Environment(folder / "bare")
        refused = bare.pip(*install, check=False, LOOKBEHIND_REQUIRE_NATIVE="1", **nothing)
        assert refused.returncode != 0, "LOOKBEHIND_REQUIRE_NATIVE=1 without a compiler"
        assert nothing["CXX"] in refused.stdout + refused.stderr, refused.stderr
        said = bare.pip("install", "-v", *install[1:], **nothing)
        assert "installing without native kernels" in said.stdout + said.stderr
        warned = bare.warnings_of_a_step("auto")
        assert warned.startswith("1 backend 'auto' uses the slower 'reference'"), warned
        assert "was not built" in warned
        assert bare.warnings_of_a_step("reference") == "0"
        (folder / "wheels without").mkdir()
        bare.pip("wheel", *install[1:], "--wheel-dir", str(folder / "wheels without"), **nothing)
        (wheel,) = (folder / "wheels without").glob("*.whl")
        check_wheel(wheel, has_library=False)
        timed("installed without a compiler, steps on the reference, warns once", started)


if __name__ == "__main__":
    main()
