"""`make wheel`: a source archive and a wheel in dist/, audited, and installed where there is no compiler.

One library serves each Python and each torch, so the wheel is one: ``py3-none-manylinux``. With an nvcc there are two,
``dist/cpu`` and ``dist/cuda``: the second has the kernels for GPUs as well, and loads without a GPU too. Both are built
from the archive, with the compiler and the flags of every other build. Only what they are linked with differs: the
names that torch's own glibc has, which zig knows, in place of those of this machine. Each is then installed beside the
oldest and the newest torch and takes steps. Any surprise is an AssertionError.
"""

import argparse
import json
import re
import shutil
import sys
import tarfile
import tempfile
import time
from itertools import product
from pathlib import Path

from tests.dist_check import Borrowing, check_wheel, source_archive, timed
from tests.installing import ROOT, Environment, has_nvcc
from tests.matrix import PYTHONS, TORCHES, interpreters

GLIBC = 2, 28  # that of torch's own wheels: a wheel that needs a newer one would be found on machines that lack it
OF_TORCH = {"libc10.so", "libtorch_cpu.so"}  # in the process before the library is loaded
ENDS = ((PYTHONS[0], TORCHES[0]), (PYTHONS[-1], TORCHES[-1]))

# As glibc's own libc.so: beside the shared library stands what is linked statically, as atexit, and the loader.
LIBC = "GROUP ( libc.so.6 libc_nonshared.a AS_NEEDED ( libld.so.2 ) )\n"
# By this variable a newer glibc tells libstdc++ that there is one thread; 0 says that there may be more.
SINGLE_THREADED = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'


def link_flags(tools: Environment, folder: Path) -> str:
    """What the linker is told to find glibc's names of ``GLIBC``, and none that came later: an error, not a surprise.

    Args:
        tools: with zig.
        folder: empty; for libraries that have names and no code.
    """
    source, object_, cache = folder / "single_threaded.c", folder / "single_threaded.o", folder / "zig"
    source.write_text(SINGLE_THREADED)
    zig = ("-m", "ziglang", "cc", "-target", "x86_64-linux-gnu.{}.{}".format(*GLIBC), "-O2", "-fPIC", str(source))
    for arguments in (("-c", "-o", str(object_)), ("-shared", "-o", str(folder / "single_threaded.so"))):
        tools.run(*zig, *arguments, ZIG_GLOBAL_CACHE_DIR=str(cache), ZIG_LOCAL_CACHE_DIR=str(cache))
    (libc,) = cache.glob("o/*/libc.so.6")
    for path in libc.parent.glob("lib*.so.*"):
        shutil.copyfile(path, folder / path.name)
        folder.joinpath(path.name.partition(".so")[0] + ".so").symlink_to(path.name)
    (folder / "libc.so").unlink()
    (folder / "libc.so").write_text(LIBC)
    return f"-Wl,-s,-z,defs -L{folder} {object_}"


def tag_of(found: dict) -> str:
    """The tag that auditwheel finds, of its report (``auditwheel show --json``).

    It leaves "linux" to every wheel that needs libraries from elsewhere, as it does not know that torch is there
    before: the tag is that of the symbols, once no other such library is needed.
    """
    assert set(found["external_libs"]) == OF_TORCH, found["external_libs"]
    assert not found["unsupported_isa"], "instructions that not every x86_64 has, outside the kernels that ask for them"
    tag = found["sym_tag"]
    numbers = re.fullmatch(r"manylinux_(\d+)_(\d+)_x86_64", tag)
    assert numbers, tag
    assert tuple(map(int, numbers.groups())) <= GLIBC, f"{tag}: {found['versioned_symbols']}"
    return tag


def audited(tools: Environment, wheel: Path) -> Path:
    """The wheel with its true tag, beside which the report of auditwheel is printed."""

    def show(wheel: Path) -> str:
        return tag_of(json.loads(tools.run("-m", "auditwheel", "show", "--json", str(wheel)).stdout))

    tags = ("--python-tag", "py3", "--abi-tag", "none", "--platform-tag", show(wheel), "--remove")
    name = tools.run("-m", "wheel", "tags", *tags, str(wheel)).stdout.strip()
    wheel = wheel.with_name(name)
    assert wheel.stem.split("-")[2:] == ["py3", "none", show(wheel)], wheel.name
    print(tools.run("-m", "auditwheel", "show", str(wheel)).stdout.strip(), flush=True)
    return wheel


def build(kinds: list[str], folder: Path, dist: Path) -> dict[str, Path]:
    """Build and audit the archive and a wheel of each kind; the wheels by kind.

    Args:
        kinds: "cpu", "cuda".
        folder: empty.
        dist: where the archive and, in a folder for each kind, the wheels are left. Those that were there go.
    """
    started = time.monotonic()
    tools = Environment(folder / "tools")  # its own: zig takes 400 MB
    tools.pip("install", "-q", "-c", str(ROOT / "constraints.txt"), "auditwheel", "wheel", "ziglang")
    (folder / "glibc").mkdir()
    flags = link_flags(tools, folder / "glibc")
    timed("auditwheel, wheel and zig", started)
    archive = source_archive(folder)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "archive", filter="data")
    (source,) = (folder / "archive").iterdir()
    builder, wheels = Borrowing(folder / "builder"), {}
    shutil.rmtree(dist, ignore_errors=True)
    for kind in kinds:  # one after the other in one folder: what is for CPUs is compiled once
        started = time.monotonic()
        variables = {"LDFLAGS": flags} | ({"CUDA_HOME": "none"} if kind == "cpu" else {})
        target = dist / kind
        options = ("-q", "--no-build-isolation", "--no-deps", "-w", str(target))
        builder.pip("wheel", *options, str(source), **variables)
        (wheel,) = target.iterdir()
        wheels[kind] = audited(tools, wheel)
        check_wheel(wheels[kind], has_library=True)
        timed(f"dist/{kind}: {wheels[kind].stat().st_size / 1e6:.2f} MB, built and audited", started)
    shutil.copy(archive, dist)
    return wheels


def left_in(dist: Path, kinds: list[str]) -> dict[str, Path]:
    """The wheels that an earlier call has left."""
    wheels = {kind: path for kind in kinds for path in dist.glob(f"{kind}/*.whl")}
    assert wheels, f"{dist}: expected {' or '.join(f'{kind}/*.whl' for kind in kinds)}, found none"
    return wheels


def install(wheels: dict[str, Path], beside: list[tuple[str, str]], folder: Path) -> None:
    """Install them beside each Python and torch, with no compiler on the path, and take steps."""
    found = interpreters(sorted({python for python, _ in beside}))
    for python, torch in beside:
        assert python in found, f"Python {python}: expected an interpreter that makes environments, found none"
        started = time.monotonic()
        environment = Environment(folder / "environment", found[python])
        path = str(environment.python.parent)
        assert not any(shutil.which(name, path=path) for name in ("c++", "g++", "cc", "gcc", "clang", "nvcc"))
        environment.install_torch(torch)
        timed(f"torch {torch} for Python {python}", started)
        for kind, wheel in wheels.items():
            started = time.monotonic()
            environment.pip("install", "-q", "--no-deps", "--force-reinstall", str(wheel), PATH=path)
            version, cuda, worst = environment.smoke(kind == "cuda", PATH=path)
            where = f"Python {python}, torch {version} (CUDA: {cuda})"
            timed(f"{where}: the wheel in dist/{kind} steps as the reference ({worst} of the tolerance)", started)
        shutil.rmtree(folder / "environment")


def kinds_of(cpu: bool, cuda: bool, has_nvcc: bool) -> list[str]:
    """Which wheels are built: those that are asked for, else all that can be."""
    return ["cpu"] * (cpu or not cuda) + ["cuda"] * (cuda or (has_nvcc and not cpu))


def pairs_of(pythons: list[str] | None, torches: list[str] | None) -> list[tuple[str, str]]:
    """Beside which Python and torch they are installed: all that are asked for, else both ends."""
    if not pythons and not torches:
        return [*ENDS]
    return [*product(pythons or PYTHONS, torches or (TORCHES[0], TORCHES[-1]))]


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m tests.wheel", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="the wheel for CPUs; by default both, with an nvcc")
    parser.add_argument("--cuda", action="store_true", help="the wheel with kernels for GPUs")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--no-install", action="store_true", help="build and audit only")
    only.add_argument("--no-build", action="store_true", help="install what is in dist/")
    parser.add_argument("--python", nargs="+", help=f"install into each of these, of {' '.join(PYTHONS)}")
    parser.add_argument("--torch", nargs="+", help=f"beside each of these, of {' '.join(TORCHES)}")
    options = parser.parse_args(arguments)
    if options.cuda and not options.no_build and not has_nvcc():
        parser.error("--cuda: expected nvcc, in CUDA_HOME or on the path, found none")
    return options


def main() -> None:
    """Build, audit, install."""
    options = parsed(sys.argv[1:])
    with tempfile.TemporaryDirectory() as name:
        if options.no_build:
            wheels = left_in(ROOT / "dist", kinds_of(options.cpu, options.cuda, has_nvcc=True))
        else:
            wheels = build(kinds_of(options.cpu, options.cuda, has_nvcc()), Path(name), ROOT / "dist")
        if not options.no_install:
            install(wheels, pairs_of(options.python, options.torch), Path(name))


if __name__ == "__main__":
    main()
