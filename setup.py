"""Build script: the native kernels, and those for GPUs. All that every setuptools reads is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch
from setuptools import __version__, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

# The oldest torch that pyproject.toml allows. What is built for its stable ABI serves it and all later ones.
TARGET = f"-DTORCH_TARGET_VERSION=0x{2:02x}{10:02x}{0:012x}"
# rules.h says what is fused. Were floating-point operations to trap, no choice between two results would be vectorised.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wno-unknown-pragmas"]
ARCHITECTURES = "8.0;9.0;10.0+PTX"  # of GPUs; the environment variable TORCH_CUDA_ARCH_LIST names others
NATIVE = os.environ.get("LOOKBEHIND_NATIVE") != "0"
WAYS_OUT = """Either install a C++17 compiler (g++; CXX names another) and, for GPUs, the CUDA toolkit for this PyTorch
(CUDA_HOME names it, CUDA_HOME=none leaves GPUs out), or set LOOKBEHIND_NATIVE=0 to install without native kernels."""


class Build(BuildExtension):
    """Builds the library, or ends the installation in words: slow without a warning is worse than not installed."""

    def run(self) -> None:
        """Build the library."""
        try:
            super().run()
        except Exception as error:
            sys.exit(f"lookbehind_fused: its native kernels were not built: {error}\n{WAYS_OUT}")

    def build_extensions(self) -> None:
        """Add what is for GPUs, if there is a CUDA toolkit: in $CUDA_HOME or, where that is not set, on $PATH."""
        compiler = get_cxx_compiler().split(" ")[0]
        if not shutil.which(compiler):
            raise FileNotFoundError(f"there is no C++ compiler {compiler!r}")
        name = f"{os.environ['CUDA_HOME']}/bin/nvcc" if os.environ.get("CUDA_HOME") else "nvcc"
        if not torch.version.hip and (nvcc := shutil.which(name)):
            self.add_cuda(nvcc)
        else:
            print(f"lookbehind_fused: no CUDA toolkit ({name}): kernels for CPUs alone", file=sys.stderr)
        self.force = True  # link again: a library that is newer than its objects may lack those that were added
        super().build_extensions()

    def add_cuda(self, nvcc: str) -> None:
        """Compile what has changed. CUDA's runtime is linked statically: the library loads where there is none."""
        named = re.findall(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
        codes = [(f"{a}{b}", f"sm_{a}{b}" + (f",compute_{a}{b}" if ptx else "")) for a, b, ptx in named]
        options = ["-optf", "csrc/cuda/nvcc.options", *(f"-gencode=arch=compute_{n},code=[{c}]" for n, c in codes)]
        changed = max(path.stat().st_mtime for path in [*Path("csrc").rglob("*.*"), Path(__file__)])
        folder = Path(self.build_temp, "cuda", "-".join(code for _, code in codes))
        folder.mkdir(parents=True, exist_ok=True)

        def compiled(source: Path) -> str:
            target = folder / f"{source.stem}.o"
            if not target.exists() or target.stat().st_mtime < changed:
                subprocess.run([nvcc, *options, "-c", str(source), "-o", f"{target}.new"], check=True)
                Path(f"{target}.new").replace(target)
            return str(target)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            native.extra_objects = [*pool.map(compiled, sorted(Path("csrc/cuda").glob("*.cu")))]
        said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        native.library_dirs += re.findall(r'"-L(.+?)"', said)
        native.extra_link_args += ["-Wl,--exclude-libs,ALL", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        native.sources.append("csrc/cuda/ops.cpp")

    def get_ext_filename(self, name: str) -> str:
        """One name for every Python: the library is loaded by torch and has no Python in it."""
        return str(Path(*name.split("."))) + ".abi3.so"


native = CppExtension(
    name="lookbehind_fused._native",
    sources=sorted(str(path) for path in [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")]),
    depends=sorted(str(path) for pattern in ("*.h", "cpu/*.[hi]*", "cuda/*") for path in Path("csrc").glob(pattern)),
    extra_compile_args={"cxx": [*FLAGS, *WARNINGS, TARGET]},
    py_limited_api=True,
)

if "dist_info" in sys.argv and not (find_spec("wheel") or find_spec("setuptools.command.bdist_wheel")):
    sys.exit(f"lookbehind_fused: setuptools {__version__} makes no wheels: pip install 'setuptools>=77.0.3' first")
options = {"bdist_wheel": {"py_limited_api": "cp310"}}
setup(license="Apache-2.0", ext_modules=[native] * NATIVE, cmdclass={"build_ext": Build}, options=options)
