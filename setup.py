"""Build script: the native kernels, and those for GPUs. All that needs no code is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# rules.h says what is fused. Were floating-point operations to trap, no choice between two results would be vectorised.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wno-unknown-pragmas"]
ARCHITECTURES = "8.0;9.0;10.0+PTX"  # of GPUs; the environment variable TORCH_CUDA_ARCH_LIST names others


def target_version() -> str:
    """The torch whose stable ABI is built against, as its headers want it: the binary serves it and all later ones."""
    major, minor = (int(part) for part in re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
    return f"0x{major:02x}{minor:02x}{0:012x}"


class BuildOrGoOn(BuildExtension):
    """Builds what it can. Without a compiler the package installs without its kernels and says so when used."""

    def go_on(self, build, kernels: str) -> None:
        """Build, or report why not; LOOKBEHIND_REQUIRE_NATIVE=1 makes that an error."""
        try:
            build()
        except Exception as error:
            if os.environ.get("LOOKBEHIND_REQUIRE_NATIVE") == "1":
                raise
            print(f"lookbehind_fused: installing without {kernels} kernels: {error}", file=sys.stderr)
            self.extensions = [] if kernels == "native" else self.extensions

    def run(self) -> None:
        """Build the library."""
        self.go_on(super().run, "native")

    def build_extensions(self) -> None:
        """Add what is for GPUs, if there is a CUDA toolkit: in $CUDA_HOME or, where that is not set, on $PATH."""
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
        if nvcc and not torch.version.hip:
            self.go_on(lambda: self.add_cuda(nvcc), "CUDA")
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
    extra_compile_args={"cxx": [*FLAGS, *WARNINGS, f"-DTORCH_TARGET_VERSION={target_version()}"]},
    py_limited_api=True,
)

setup(ext_modules=[native], cmdclass={"build_ext": BuildOrGoOn}, options={"bdist_wheel": {"py_limited_api": "cp310"}})
