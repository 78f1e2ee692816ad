"""Build script: the native kernels. Everything about the package that needs no code is in pyproject.toml."""

import os
import re
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension


def target_version() -> str:
    """The torch whose stable ABI is built against, as its headers want it: the binary serves it and all later ones."""
    major, minor = (int(part) for part in re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
    return f"0x{major:02x}{minor:02x}{0:012x}"


class BuildOrGoOn(BuildExtension):
    """Builds the kernels if it can. Without a compiler the package installs without them and says so when used."""

    def run(self) -> None:
        """Build, or report why not; LOOKBEHIND_REQUIRE_NATIVE=1 makes that an error."""
        try:
            super().run()
        except Exception as error:
            if os.environ.get("LOOKBEHIND_REQUIRE_NATIVE") == "1":
                raise
            print(f"lookbehind_fused: installing without native kernels: {error}", file=sys.stderr)
            self.extensions = []

    def get_ext_filename(self, name: str) -> str:
        """One name for every Python: the library is loaded by torch and has no Python in it."""
        return str(Path(*name.split("."))) + ".abi3.so"


native = CppExtension(
    name="lookbehind_fused._native",
    sources=sorted(str(path) for path in [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")]),
    depends=sorted(str(path) for pattern in ("*.h", "cpu/*.h", "cpu/*.inc") for path in Path("csrc").glob(pattern)),
    extra_compile_args={
        "cxx": [
            "-std=c++17",
            "-O3",
            "-fno-math-errno",
            "-ffp-contract=off",  # rules.h says what is fused
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-unknown-pragmas",
            f"-DTORCH_TARGET_VERSION={target_version()}",
        ]
    },
    py_limited_api=True,
)

setup(ext_modules=[native], cmdclass={"build_ext": BuildOrGoOn}, options={"bdist_wheel": {"py_limited_api": "cp310"}})
