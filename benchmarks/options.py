"""The command line of the main job: every option, its unit and its default."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import methods
from benchmarks.methods import METHODS

DATASETS = ("digits", "fashion-mnist", "cifar10")

# A resumed run takes all other options from its checkpoint; only these may be given anew. Where the data lies does not
# matter as long as it is the same data, and another number of threads is noted.
FREE_ON_RESUME = frozenset({"data_dir", "threads", "checkpoint_every"})

# Of the comparison that runs where no option of a single run is given.
OF_COMPARISON = frozenset({"quick", "jobs", "results"})

DESCRIPTION = """\
Trains a small residual network on real images with SGD, SAM, Lookbehind and the methods around them for the same
number of steps. Without options: a comparison on digits with wrong labels, each method at its best rho, five seeds;
its tables and what they say in words. With options: a single run with those, its table,
checkpoints, CSV, JSON and a picture of loss, accuracy and alpha in its output folder.

A single run's sharpness is what one ascent of radius rho adds to the training loss, in nats; "accuracy, noise" that on
test images with every weight multiplied by 1 + 0.2 N(0, 1), the mean of 10 draws."""

EPILOG = """\
examples:
  python -m benchmarks.train --k 5 --rho 0.1 --label-noise 0.2
  python -m benchmarks.train --data fashion-mnist --method sam,lookbehind --epochs 10 --batch-size 128
  python -m benchmarks.train --resume                    continues the run in runs/ that was last active"""


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')} (--help explains the options)\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        """Adds the default to each help text that has one and does not mention it itself."""
        text = action.help or ""
        shown = action.default not in (None, argparse.SUPPRESS) and not isinstance(action.default, bool)
        if action.option_strings and shown and "default" not in text:
            text += " (default: %(default)s)"
        return text


def _number(kind: type, expected: str, accepts: Any) -> Any:
    """An argparse type that says what was expected."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return convert


count = _number(int, "a whole number of at least 1", lambda n: n >= 1)
_seed = _number(int, "a whole number from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)
_not_negative = _number(float, "a number of at least 0", lambda x: x >= 0)
_positive = _number(float, "a number above 0", lambda x: x > 0)
_fraction = _number(float, "a fraction from 0 to 1", lambda x: 0 <= x <= 1)
_alpha = _number(float, "a number above 0 and at most 1 (adaptive: --method lookbehind-adaptive)", lambda x: 0 < x <= 1)


def _methods(text: str) -> list[str]:
    chosen = text.split(",")
    for method in chosen:
        if method not in METHODS:
            raise argparse.ArgumentTypeError(f"expected {', '.join(METHODS)}, got {method!r}")
    return chosen


def build_parser() -> argparse.ArgumentParser:
    """The parser behind `python -m benchmarks.train --help`."""
    parser = Parser(
        prog="benchmarks.train", description=DESCRIPTION, epilog=EPILOG, formatter_class=_Help, allow_abbrev=False
    )
    add = parser.add_argument_group("what to train").add_argument
    add(
        "--method", type=_methods, action="extend", metavar="M", help="one of " + ", ".join(METHODS) + "; several with "
        f"commas or by repeating the option (default: {', '.join(methods.DEFAULT)})",
    )  # fmt: skip
    add("--data", choices=DATASETS, default="digits", help="digits (8x8, in scikit-learn), fashion-mnist or cifar10")
    add(
        "--data-dir", metavar="DIR", help="folder of fashion-mnist's IDX files, gzipped or not (default: "
        "where Debian's package dataset-fashion-mnist puts them), or of cifar10's binary batches (no default)",
    )  # fmt: skip
    add("--limit", type=count, metavar="N", help="images to use of each part, the first N (default: all)")
    add(
        "--label-noise", type=_fraction, default=0.0, metavar="F",
        help="fraction of the training labels to turn into a random wrong class",
    )  # fmt: skip
    add("--width", type=count, default=16, metavar="N", help="channels of the network's first stage")
    add("--depth", type=count, default=1, metavar="N", help="residual blocks in each of the network's three stages")

    add = parser.add_argument_group("how long").add_argument
    add("--epochs", type=count, default=20, metavar="N", help="passes over the training images, for every method")
    add("--batch-size", type=count, default=64, metavar="N", help="images a step; the last, partial batch is dropped")
    add("--seed", type=_seed, default=0, metavar="N", help="decides the weights, the order and the label noise")

    add = parser.add_argument_group("base optimizer (SGD)").add_argument
    add("--lr", type=_positive, default=0.05, metavar="X", help="learning rate at the first step")
    add(
        "--schedule",
        choices=("cosine", "constant"),
        default="cosine",
        help="its course over the steps: to 0, or flat",
    )
    add("--momentum", type=_fraction, default=0.9, metavar="X", help="SGD's momentum, from 0 to 1")
    add("--weight-decay", type=_not_negative, default=5e-4, metavar="X", help="L2 penalty's factor")

    add = parser.add_argument_group("the methods over it").add_argument
    add(
        "--k", type=count, default=2, metavar="N", help="inner steps of Lookbehind, ascents of Multistep-SAM, steps "
        "between two of Lookahead's slow weights (SAM has 1)",
    )  # fmt: skip
    add("--rho", type=_not_negative, default=0.05, metavar="X", help="radius of one ascent step, an L2 norm of weights")
    add("--alpha", type=_alpha, default=0.5, metavar="X", help="slow step size of Lookbehind and Lookahead, in (0, 1]")
    add(
        "--alpha-scope", choices=("global", "tensor"), default="global",
        help="adaptive alpha: one for all weights or one a tensor",
    )  # fmt: skip
    add("--asam", action="store_true", help="scale the ascent by |weights| + eta, as ASAM does (default: off)")
    add("--eta", type=_not_negative, default=0.01, metavar="X", help="ASAM's stabilizer, in units of a weight")
    add(
        "--no-reuse", action="store_true",
        help="Lookbehind: evaluate 2k gradients a step instead of reusing them for k + 1 (default: off)",
    )  # fmt: skip
    add(
        "--microbatches", type=count, default=1, metavar="M", help="m-SAM: parts of the minibatch that ascend by "
        "themselves, in SAM, Lookahead-SAM and Lookbehind; M times as many gradients, each of a part",
    )  # fmt: skip

    add = parser.add_argument_group("where and with what").add_argument
    add("--device", default="cpu", metavar="D", help="torch device: cpu, cuda, cuda:1, ...")
    add("--backend", default="auto", metavar="B", help="Lookbehind's kernels; auto takes the fastest for the device")
    add(
        "--autocast", choices=("bfloat16", "float16"),
        help="train under torch.autocast, without scaling the loss; evaluated in float32 (default: off)",
    )  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the network; needs a C++ compiler (default: off)")
    add(
        "--threads",
        type=count,
        metavar="N",
        help="CPU threads (default: 1 for digits, which are small, else torch's)",
    )

    add = parser.add_argument_group("files").add_argument
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for everything written (default: runs/DATA-001, "
        "-002, ...; of the comparison runs/train, which goes on where it was stopped)",
    )
    add(
        "--resume", action="store_true", help="continue the run in --output (default: the newest in runs/) with its "
        "own options, to the same result bit for bit",
    )  # fmt: skip
    add(
        "--checkpoint-every", type=count, metavar="N",
        help="steps between two checkpoints inside an epoch (default: only at its end)",
    )  # fmt: skip

    add = parser.add_argument_group("the comparison, with --output alone").add_argument
    add("--quick", action="store_true", help="a few steps: a trial of the program, which says nothing (default: off)")
    add("--jobs", type=count, metavar="N", help="worker processes (default: one a core)")
    add("--results", type=Path, metavar="DIR", help="folder of tables and picture (default: that of --output)")
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, frozenset[str]]:
    """The options, and the names of those that were given rather than left at their default."""
    parser = build_parser()
    options = parser.parse_args(argv)
    options.method = list(dict.fromkeys(options.method or methods.DEFAULT))
    # argparse leaves alone what the namespace already has, so whatever is still there was not given.
    absent = object()
    blank = argparse.Namespace(**{name: absent for name in vars(options) if name != "method"})
    seen = vars(parser.parse_args(argv, blank))
    return options, frozenset(name for name, value in seen.items() if value is not absent and value is not None)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that belong to a run and not to a call, as plain values for a checkpoint or JSON."""
    return {
        name: value for name, value in sorted(vars(options).items()) if name not in {"output", "resume", *OF_COMPARISON}
    }


def as_flag(name: str, value: Any) -> str:
    """An option as one would type it."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool) or value is None:
        return flag if value else f"no {flag}"
    return f"{flag} {','.join(value) if isinstance(value, list) else value}"
