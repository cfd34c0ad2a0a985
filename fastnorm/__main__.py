"""The command line: `python -m fastnorm info`, `train`, `bench` and `accuracy`."""

from __future__ import annotations

import argparse
import io
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import _runtime
from ._demo.errors import INTERRUPTED, USER_ERROR, UserError

TRAIN = """\
Train Dense - BatchNorm - ReLU, twice, then Dense - softmax cross-entropy, on scikit-learn's 8 x 8 digits (one
scan of every five is held out for the test) or on IDX files, on the kernels of fastnorm and on its NumPy twin, and
compare the two. The same seed gives the same bits, at any number of threads."""

TRAIN_END = """\
A checkpoint is written after every epoch. --load continues it with the settings it was saved with, up to --epochs in
all, and gives the same bits as a run that was never interrupted; only --epochs, --lr, --beta and --batch-size can be
changed on the way. Exit status: 0, 2 for a mistake in what was given, 130 when interrupted."""

BENCH = """\
Measure each kernel on shapes that people use, beside the rivals that are installed (PyTorch, JAX, thinc, ...), beside
its NumPy twin, and beside the memory limit of this machine, all in one run, calls interleaved. Stop everything else
first."""

BENCH_END = """\
Rivals: PyTorch, torch.compile, JAX, thinc, DeepSpeed; `pip install "fastnorm[bench]"` installs the first four.
torch.compile and DeepSpeed compile C++ before they run, and are left out unless --full or --rivals asks for them.
Exit status: 0, 2 for a mistake in what was given, 130 when interrupted."""

ACCURACY = """\
Measure the error of each kernel at each instruction set, in ulp, against float64 (for float32) and against long double
(for float64), on ordinary data and on data that is hard to get right, beside PyTorch if it is installed."""

ACCURACY_END = """\
Exit status: 0, 1 if an error is beyond its bound, 2 for a mistake in what was given, 130 when interrupted."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which takes no abbreviations."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is unknown here, in the words of the subcommand, not in those of the whole program."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown option or argument: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """Show the message alone, where argparse prints the usage first."""
        raise UserError(f"{message} (see {self.prog} --help)")


def _integer(low: int, high: float = math.inf) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            expected = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"expected an integer {expected}, got {text!r}")
        return number

    return parse


def _number(low: float, high: float, *, open_low: bool) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (low < number < high or (number == low and not open_low)):
            bracket = "(" if open_low else "["
            raise argparse.ArgumentTypeError(f"expected a number in {bracket}{low:g}, {high:g}), got {text!r}")
        return number

    return parse


def _parser() -> Parser:
    from ._demo import settings

    parser = Parser(prog="python -m fastnorm", description="fastnorm: training kernels for NumPy arrays on the CPU")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    info = commands.add_parser("info", help="show version, instruction set, threads, OpenMP, compiler and flags")
    info.set_defaults(run=_info)

    train = commands.add_parser("train", help="train a network on real digits", description=TRAIN, epilog=TRAIN_END)
    train.set_defaults(run=_train)
    add = train.add_argument
    rates = ", ".join(f"{rule.lr:g} {name}" for name, rule in settings.RULES.items())
    betas = ", ".join(f"{rule.beta_name} of {name} ({rule.beta:g})" for name, rule in settings.RULES.items()
                      if rule.beta_name)
    add("--data", type=Path, metavar="DIR",
        help="train on the IDX files in DIR, gzipped or not, as MNIST and Fashion-MNIST are published "
             "(train-images-idx3-ubyte, ...; default: scikit-learn's digits)")
    add("--optimizer", choices=settings.RULES, help="default: adam")
    add("--activation", choices=settings.ACTIVATIONS, help="default: relu")
    add("--init", choices=settings.INITS,
        help="default: he_normal for relu and leaky_relu, lecun_normal for elu and celu, else xavier_normal")
    add("--dropout", type=_number(0, 1, open_low=False), metavar="P",
        help="probability of dropping a hidden unit (default: 0)")
    add("--batch-size", type=_integer(2), metavar="N", help="default: 64")
    add("--epochs", type=_integer(1), metavar="N",
        help=f"in all, those of a checkpoint included (default: {settings.EPOCHS}; {settings.SEARCH_EPOCHS} a setting "
             "with --search)")
    add("--lr", type=_number(0, math.inf, open_low=True), metavar="RATE", help=f"learning rate (default: {rates})")
    add("--beta", type=_number(0, 1, open_low=False), metavar="B", help=f"decay of the averages: {betas}")
    add("--seed", type=_integer(0), metavar="N", help="default: 0")
    add("--threads", type=_integer(1, _runtime.MAX_THREADS), metavar="N",
        help="threads of the kernels (default: what `python -m fastnorm info` shows)")
    add("--augment", action="store_true", default=None, help="shift each training image at random, anew in every epoch")
    add("--backend", choices=("both", "fastnorm", "reference"), default="both",
        help="both (default): train on fastnorm, then the same on its NumPy twin, and compare; "
             "--save then keeps the run on fastnorm")
    add("--save", type=Path, metavar="FILE", help="write a checkpoint (.npz) after every epoch")
    add("--load", type=Path, metavar="FILE", help="continue a checkpoint")
    add("--plot", type=Path, metavar="FILE", help="draw the training and test curves (.png, .pdf, .svg, ...)")
    add("--search", type=_integer(1), metavar="N",
        help="instead of one training: try N random pairs of learning rate and beta for a few epochs each, then a "
             "finer round around the best, and rank them on a validation split of the training set")

    bench = commands.add_parser("bench", help="measure the kernels beside their rivals", description=BENCH,
                                epilog=BENCH_END)
    bench.set_defaults(run=_bench)
    add = bench.add_argument
    add("--threads", type=_integer(1, _runtime.MAX_THREADS), metavar="N",
        help="threads of every rival (default: what `python -m fastnorm info` shows)")
    add("--seconds", type=_number(0, math.inf, open_low=True), metavar="S",
        help="how long each case runs, in all (default: 3; 4 with --full)")
    add("--only", metavar="PATTERN",
        help="only cases whose name has all these words, of the full grid where the quick one has none: --only "
             "'backward NHWC'")
    add("--rivals", metavar="LIST", help="names, separated by commas, or none (default: those installed)")
    add("--plot", type=Path, metavar="FILE", help="draw speed-ups and shares of the limit (.png, .pdf, .svg, ...)")
    add("--json", type=Path, metavar="FILE", help="write what was measured; bench/report.py reads it")
    add("--full", action="store_true",
        help="the whole grid, sizes from 1 KB to 1 GB, every instruction set, one thread too: takes an hour or more")

    accuracy = commands.add_parser("accuracy", help="measure the kernels' errors in ulp", description=ACCURACY,
                                   epilog=ACCURACY_END)
    accuracy.set_defaults(run=_accuracy)
    add = accuracy.add_argument
    add("--only", metavar="PATTERN", help="only cases whose name has all these words: --only 'softmax float32'")
    add("--quick", action="store_true", help="smaller arrays, fewer steps: seconds in place of minutes")
    add("--exhaustive", action="store_true", help="exp of every finite float32 x <= 0, not of a sample: 2**31 of them")
    add("--json", type=Path, metavar="FILE", help="write the figures")
    add("--markdown", type=Path, metavar="FILE", help="write the page, docs/accuracy.md")
    return parser


def _info(arguments: argparse.Namespace) -> None:
    lines = _runtime.config()
    indent = max(map(len, lines)) + 2
    # Long flags wrap under themselves on a terminal; a pipe gets one line an entry.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for title, text in lines.items():
        print(textwrap.fill(f"{title:{indent}s}{text}", width, subsequent_indent=" " * indent, break_on_hyphens=False,
                            break_long_words=False))


def _train(arguments: argparse.Namespace) -> None:
    from ._demo import command, settings

    options = vars(arguments)
    given = {name: options[name] for name in settings.Settings.__dataclass_fields__ if options[name] is not None}
    rest = {name: options[name] for name in command.Job.__dataclass_fields__ if name != "given"}
    command.train(command.Job(given=given, **rest))


def _bench(arguments: argparse.Namespace) -> None:
    from ._bench import command

    options = vars(arguments)
    command.bench(command.Job(**{name: options[name] for name in command.Job.__dataclass_fields__}))


def _accuracy(arguments: argparse.Namespace) -> None:
    from ._accuracy import command

    options = vars(arguments)
    command.accuracy(command.Job(**{name: options[name] for name in command.Job.__dataclass_fields__}))


def _one_line(text: str) -> str:
    """The text with control characters, such as a line break in a file name, written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _prepare_stdout() -> None:
    """Let every name be printed, and printing go nowhere where stdout is closed (`>&-`)."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _abandon_stdout() -> None:
    """Let the flush at exit succeed where stdout cannot be written any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    _prepare_stdout()
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"fastnorm: {_one_line(str(error))}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        print(f"fastnorm: interrupted{f' ({_one_line(str(interrupt))})' if str(interrupt) else ''}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough, as in `... | head`
        _abandon_stdout()
        return 1
    except OSError as error:  # a full disk under stdout, for one; files have been opened with words of their own
        print(f"fastnorm: {_one_line(str(error))}", file=sys.stderr)
        _abandon_stdout()
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
