"""What `make dist-check`, `make matrix` and `make wheel` share: new environments, the sources and torch to install into
them, and steps that are compared there.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "lookbehind_fused/_native.abi3.so"

# Prints torch, its CUDA, and the largest difference of a weight; fails where the native backend is not what is chosen.
SMOKE = """
import torch
import lookbehind_fused
from lookbehind_fused import kernels

assert lookbehind_fused.__file__.startswith({site!r}), lookbehind_fused.__file__
assert kernels.native.why_not() is None, kernels.native.why_not()
assert kernels.resolve("auto", torch.device("cpu")) is kernels.native
assert (kernels.cuda.why_not() is None) == {has_cuda}, kernels.cuda.why_not()

def weights(backend, base, dtype, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5)).to(dtype)
    inputs, targets = torch.randn(64, 7, dtype=dtype), torch.randn(64, 5, dtype=dtype)
    optimizer = lookbehind_fused.Lookbehind(model.parameters(), base, rho=0.1, backend=backend, **settings)

    def closure():
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss

    before = model[0].weight.detach().clone()
    for _ in range(4):
        optimizer.step(closure)
    assert not torch.equal(before, model[0].weight)
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])

worst = 0.0
for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
    for base in (
        dict(base=torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01), dict(base=torch.optim.AdamW, lr=0.01)
    ):
        for settings in (dict(k=2), dict(k=3, alpha="adaptive", adaptive=True)):
            ours, expected = (weights(backend, dtype=dtype, **base, **settings) for backend in ("auto", "reference"))
            found = float((ours - expected).abs().max())
            assert found <= most, (dtype, base, settings, found)
            worst = max(worst, found / most)
print(torch.__version__, torch.version.cuda, f"{{worst:.2f}}")
"""


class Absent(Exception):
    """There is no such torch for this Python."""


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

    def install_torch(self, torch: str) -> None:
        """Install a torch: two numbers of a version, or ``"newest"``.

        Raises:
            Absent: there is none for this Python.
        """
        requirement = "torch" if torch == "newest" else f"torch=={torch}.*"
        done = self.pip("install", "-q", "--no-cache-dir", requirement, check=False)
        if "No matching distribution found for torch" in done.stderr:
            raise Absent(f"pip has no torch {torch} for {self.python}")
        assert done.returncode == 0, done.stdout + done.stderr

    def smoke(self, has_cuda: bool, **variables: str) -> list[str]:
        """Steps of the installed package beside the reference's: torch, its CUDA, the worst weight in tolerances.

        Args:
            has_cuda: whether the library has the kernels for GPUs.
            variables: of the environment.
        """
        code = SMOKE.format(site=str(self.site), has_cuda=has_cuda)
        return self.run("-W", "ignore", "-c", code, **variables).stdout.split()


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
