"""Builds csrc/cuda for execution without a GPU: nvcc's objects, with a stub in the place of CUDA's runtime.

The objects are those of the package, made with its options; only ``ops.cpp`` is told that there are no devices.
"""

import fcntl
import hashlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}
CAPABILITIES = (80, 90, 100, 120)


def missing() -> str:
    """What is needed and not there; empty if nothing is."""
    wanted = [name for name in ("gpusim",) if importlib.util.find_spec(name) is None]
    if not wanted:
        from gpusim.cuda import find_nvcc

        wanted = [] if find_nvcc() else ["nvcc"]
    return " and ".join(wanted)


class Build:
    """The library, and for each dtype and compute capability the code in it.

    Args:
        dtypes: of parameters; an op for another one is not to be called.
        capabilities: what the kernels are compiled for.
        machine_code: compile to machine code too, as the package does; it is only looked at.
    """

    def __init__(
        self,
        dtypes: Sequence[str] = (*DTYPES,),
        capabilities: Sequence[int] = CAPABILITIES,
        machine_code: bool = True,
    ) -> None:
        self.sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
        self.sources.append(ROOT / "tests" / "kernels" / "cuda_stub.cpp")
        self.dtypes, self.capabilities, self.machine_code = dtypes, capabilities, machine_code
        content = b"".join(path.read_bytes() for path in [*self.sources, Path(__file__)])
        key = f"{torch.__version__} {dtypes} {capabilities} {machine_code}".encode()
        self.folder = ROOT / "build" / "cuda_cases" / hashlib.sha256(key + content).hexdigest()[:16]
        self.library = self.folder / "cuda_cases.so"
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # processes of pytest-xdist
            if not self.library.exists():
                self._build()

    def ptx(self, dtype: str, capability: int) -> str:
        """The kernels' code that is executed."""
        return (self.folder / f"kernels_{DTYPES[dtype]}.compute_{capability}.ptx").read_text()

    def cubin(self, dtype: str, capability: int) -> bytes:
        """The same as machine code."""
        name = f"kernels_{DTYPES[dtype]}.compute_{capability}.sm_{capability}.cubin"
        return (self.folder / name).read_bytes()

    def resources(self, dtype: str, capability: int) -> dict[str, dict[str, int]]:
        """Of each kernel: registers and bytes of stack of a thread, bytes of shared memory of a block."""
        from gpusim.aot import NVBIN

        cubin = self.folder / f"kernels_{DTYPES[dtype]}.compute_{capability}.sm_{capability}.cubin"
        command = [f"{NVBIN}/cuobjdump", "-res-usage", str(cubin)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", printed)
        return {name: dict(zip(("reg", "stack", "shared"), map(int, used), strict=True)) for name, *used in found}

    def _build(self) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda work: work(), [*(lambda d=d: self._kernels(d) for d in self.dtypes), self._host]))
        objects = [str(path) for path in self.folder.glob("*.o")]
        torch_at = Path(torch.__file__).parent / "lib"
        unfinished = self.folder / "unfinished.so"
        run("g++", "-shared", "-Wl,-Bsymbolic", *objects, f"-L{torch_at}", "-ltorch_cpu", "-o", str(unfinished))
        unfinished.rename(self.library)

    def _kernels(self, dtype: str) -> None:
        code = "[sm_{0},compute_{0}]" if self.machine_code else "compute_{0}"
        targets = [f"-gencode=arch=compute_{c},code={code.format(c)}" for c in self.capabilities]
        source = ROOT / "csrc" / "cuda" / f"kernels_{DTYPES[dtype]}.cu"
        kept = self.folder / dtype  # of its own: nvcc's files of two sources would get in each other's way
        kept.mkdir(exist_ok=True)
        options = ["-optf", str(ROOT / "csrc" / "cuda" / "nvcc.options"), "--keep", "--keep-dir", str(kept)]
        run(nvcc(), *options, *targets, "-c", str(source), "-o", str(self.folder / f"{source.stem}.o"))
        if len(self.capabilities) == 1:  # then nvcc does not name it
            for path in [*kept.glob(f"{source.stem}.ptx"), *kept.glob(f"{source.stem}.sm_*.cubin")]:
                ending = path.name.removeprefix(source.stem)
                path.rename(kept / f"{source.stem}.compute_{self.capabilities[0]}{ending}")
        for path in kept.glob("*.compute_*"):
            if path.suffix in (".ptx", ".cubin"):
                path.rename(self.folder / path.name)
        shutil.rmtree(kept)

    def _host(self) -> None:
        built = DTYPES[self.dtypes[0]]
        others = [f"-Dlaunch_{name}=launch_{built}" for dtype, name in DTYPES.items() if dtype not in self.dtypes]
        flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DLOOKBEHIND_KEY=CPU", "-DLOOKBEHIND_ON_CPU"]
        includes = [f"-I{path}" for path in include_paths()]
        ops = ROOT / "csrc" / "cuda" / "ops.cpp"
        run("g++", *flags, *others, *includes, "-c", str(ops), "-o", str(self.folder / "ops.o"))
        stub = ROOT / "tests" / "kernels" / "cuda_stub.cpp"
        run(nvcc(), "-Xcompiler=-fPIC,-fvisibility=hidden", "-c", str(stub), "-o", str(self.folder / "cuda_stub.o"))


def nvcc() -> str:
    """The compiler's path."""
    from gpusim.cuda import find_nvcc

    return find_nvcc()


def run(*command: str) -> None:
    """Run a compiler; what it says is in the error."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
