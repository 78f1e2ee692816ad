"""What `make dist-check` and `make matrix` share: new environments, and copies of the sources to install into them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "lookbehind_fused/_native.abi3.so"


class Environment:
    """A new virtual environment, as the interpreter makes it."""

    def __init__(self, folder: Path, python: str | Path = sys.executable) -> None:
        subprocess.run([str(python), "-m", "venv", str(folder)], check=True, capture_output=True, text=True)
        self.python = folder / "bin" / "python"
        self.site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())

    def run(self, *arguments: str, check: bool = True, cwd: Path | None = None, **variables: str):
        """Run its Python, with variables of the environment beside those that are there; what it said is kept."""
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS")}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # ninja
        command = [str(self.python), *arguments]
        done = subprocess.run(
            command, cwd=cwd or self.python.parent, env=environment | variables, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def pip(self, *arguments: str, **options: str | bool):
        return self.run("-m", "pip", "--disable-pip-version-check", *arguments, **options)


def has_nvcc() -> bool:
    """Whether setup.py finds a CUDA toolkit."""
    home = os.environ.get("CUDA_HOME")
    return bool(shutil.which(f"{home}/bin/nvcc" if home else "nvcc"))


def copy_sources(target: Path) -> None:
    """Copy what git tracks or would track."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")):
        source, copy = ROOT / os.fsdecode(name), target / os.fsdecode(name)
        if source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
