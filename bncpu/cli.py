"""The command bncpu: info, bench, train, reproduce.

Nothing is computed here: a command reads its arguments, calls the package, prints the result. An
error is one line on stderr and exit status 2, an interrupt 130, a reader that has gone away 141 and
no line; files are written whole or not at all, and whatever can be refused is refused before the
work begins.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import bncpu
from bncpu import bench as measuring
from bncpu import data, nn
from bncpu.atomic import check_writable
from bncpu.bench import options
from bncpu.experiments import EXPERIMENTS
from bncpu.experiments.results import (
    new_figure,
    plot_accuracy,
    prepare_folder,
    write_figure,
    write_json,
)

# What a training is, besides its length. With --load, what is not given comes from the file.
DEFAULTS: dict[str, Any] = {
    "dataset": "digits",
    "batch_size": 60,
    "learning_rate": 0.3,
    "momentum": 0.0,
    "hidden": [100, 100, 100],
    "activation": "sigmoid",
    "batch_norm": True,
    "seed": 0,
}
DEFAULT_EPOCHS = 20
CLASSES = 10
# The nonlinearity and the gain of the initial weights before it (see nn.fully_connected).
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Layer], float]] = {
    "sigmoid": (nn.Sigmoid, 1.0),
    "tanh": (nn.Tanh, 1.0),
    "relu": (nn.ReLU, math.sqrt(2)),
}
CHOICES = {"dataset": data.NAMES, "activation": tuple(ACTIVATIONS)}
TABLE_ROWS = 20


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, as the head of this file lists them."""
    command = "bncpu"
    try:
        try:
            args, unknown = parser().parse_known_args(argv)
            command = f"bncpu {args.command}"
            # Told here and not by parse_args, the line begins with the command's name.
            if unknown:
                raise ValueError(f"unrecognized arguments: {' '.join(unknown)}")
            args.run(args)
        finally:
            print(end="", flush=True)  # now, while an error of stdout can still be told
        return 0
    except KeyboardInterrupt:
        return complain(command, "interrupted", 130)
    except BrokenPipeError:
        give_up_stdout()
        return 141  # as if by SIGPIPE, what a shell expects of `bncpu ... | head`
    except OSError as error:
        give_up_stdout()
        # str(error) may begin with a number in brackets.
        text = error.strerror or str(error)
        return complain(command, f"{error.filename}: {text}" if error.filename else text, 2)
    except MemoryError as error:
        return complain(command, f"not enough memory; {error or 'take a smaller model'}", 2)
    except (ValueError, ImportError, OverflowError, FloatingPointError) as error:
        return complain(command, str(error), 2)


def complain(command: str, text: str, status: int) -> int:
    """Print one line on stderr and return the exit status."""
    print(f"{command}: {' '.join(text.split())}", file=sys.stderr)
    return status


def give_up_stdout() -> None:
    """Drop what stdout will not take, of which the interpreter would complain when it ends."""
    try:
        print(end="", flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def parser() -> Parser:
    """Return the parser of all commands."""
    top = Parser(
        prog="bncpu",
        description="Batch normalisation as a fast, accurate and deterministic NumPy library.",
        epilog="bncpu COMMAND --help explains a command.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"bncpu {version('bncpu')}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Any], None], summary: str, examples: str) -> Parser:
        sub: Parser = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    command("info", info, "print what this installation runs on", "  bncpu info")

    sub = command("bench", bench, options.SUMMARY, options.EXAMPLES)
    options.add_arguments(sub, positive)

    sub = command(
        "train",
        train,
        "train a fully connected network, with or without batch normalisation",
        "  bncpu train --epochs 10\n"
        "  bncpu train --no-batch-norm --learning-rate 0.5 --steps 2000 --out without\n"
        "  bncpu train --dataset mnist --data-dir ~/mnist --hidden 300 100 --activation relu\n"
        "  bncpu train --epochs 5 --save run.safetensors\n"
        "  bncpu train --load run.safetensors --epochs 5   (goes on, bit for bit)",
    )
    train_arguments(sub)

    sub = command(
        "reproduce",
        reproduce,
        "repeat an experiment of the paper: a table, and a figure",
        "  bncpu reproduce digits --quick\n  bncpu reproduce digits --out figure1 --seed 3",
    )
    sub.add_argument("name", choices=sorted(EXPERIMENTS), help="which experiment")
    sub.add_argument("--quick", action="store_true", help="fewer steps: seconds, not minutes")
    sub.add_argument("--seed", type=natural, default=0, metavar="N", help="default: 0")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="default: bncpu-NAME")
    sub.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return top


def train_arguments(sub: Parser) -> None:
    """Add the arguments of `train`; those in DEFAULTS are None unless given."""
    what = sub.add_argument_group("what is trained (with --load: default as in the file)")

    def setting(name: str, help_: str, **options: Any) -> None:
        default = DEFAULTS[name]
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        flag = "--" + name.replace("_", "-")
        if name in NUMBERS:
            options["type"] = NUMBERS[name]
        if name in CHOICES:
            options["choices"] = CHOICES[name]
        what.add_argument(flag, dest=name, help=f"{help_} (default: {shown})", **options)

    setting("dataset", "digits needs no file")
    setting("hidden", "sizes of the hidden layers", type=positive, nargs="+", metavar="N")
    setting("activation", "their nonlinearity")
    setting(
        "batch_norm",
        "normalise before each nonlinearity",
        action=argparse.BooleanOptionalAction,
        default=None,
    )
    setting("batch_size", "examples in a step", metavar="N")
    setting("learning_rate", "of plain gradient descent", metavar="X")
    setting("momentum", "0 to less than 1", metavar="X")
    setting("seed", "of the initial weights and the order", metavar="N")

    how = sub.add_argument_group("how long, from where, to where")
    length = how.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=positive, metavar="N", help=f"passes (default: {DEFAULT_EPOCHS})"
    )
    length.add_argument("--steps", type=positive, metavar="N", help="batches, instead of --epochs")
    how.add_argument(
        "--data-dir", type=Path, metavar="FOLDER", help="holds the dataset (default: $BNCPU_DATA)"
    )
    how.add_argument(
        "--threads", type=positive, metavar="N", help="of bncpu and NumPy's BLAS (default: theirs)"
    )
    how.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write results.json and figure.png there"
    )
    how.add_argument("--save", type=Path, metavar="FILE", help="write the model as safetensors")
    how.add_argument("--load", type=Path, metavar="FILE", help="go on from a file of --save")
    how.add_argument("--no-progress", action="store_true", help="show no progress bar")


def number(text: str, kind: Callable[[str], Any], ok: Callable[[Any], bool], what: str) -> Any:
    """Return the number that `text` is, or refuse it as not being `what`."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not ok(value):
        raise argparse.ArgumentTypeError(f"expected {what}; got {text!r:.60}")
    return value


def positive(text: str) -> Any:
    """Read an integer of at least 1."""
    return number(text, int, lambda n: n >= 1, "a positive integer")


def natural(text: str) -> Any:
    """Read an integer of at least 0."""
    return number(text, int, lambda n: n >= 0, "an integer >= 0")


def rate(text: str) -> Any:
    """Read a finite positive number."""
    return number(text, float, lambda x: 0 < x < math.inf, "a positive number")


def fraction(text: str) -> Any:
    """Read a number from 0 to less than 1."""
    return number(text, float, lambda x: 0 <= x < 1, "a number >= 0 and < 1")


NUMBERS = {"batch_size": positive, "learning_rate": rate, "momentum": fraction, "seed": natural}


def info(_: argparse.Namespace) -> None:
    """Print the configuration."""
    bncpu.show_config()


def bench(args: argparse.Namespace) -> None:
    """Run the benchmark."""
    for path in (args.json, args.plot):
        if path:
            check_writable(path)
    measuring.run(
        shapes=args.shape,
        operations=args.op,
        dtype=args.dtype,
        layout=args.layout,
        num_threads=args.threads,
        level=args.level,
        against=args.against,
        quick=args.quick,
        in_cache=args.in_cache,
        json_path=args.json,
        plot_path=args.plot,
    )


def reproduce(args: argparse.Namespace) -> None:
    """Run an experiment of the paper."""
    out = args.out or Path(f"bncpu-{args.name}")
    EXPERIMENTS[args.name](out, quick=args.quick, seed=args.seed, progress=not args.no_progress)


def train(args: argparse.Namespace) -> None:
    """Train a network, print its accuracy by step, and write what is asked for."""
    checkpoint = nn.read_checkpoint(args.load) if args.load else None
    settings = training_settings(args, checkpoint)
    if args.threads:
        limit_threads(args.threads)
    dataset = data.load(settings["dataset"], args.data_dir)
    activation, gain = ACTIVATIONS[settings["activation"]]
    sizes = [dataset.x_train.shape[1], *settings["hidden"], CLASSES]
    if checkpoint:
        checkpoint.check_sizes(sizes)  # before anything is allocated on the word of the file
    model = nn.fully_connected(
        sizes,
        activation=activation,
        batch_norm=settings["batch_norm"],
        gain=gain,
        rng=np.random.default_rng(settings["seed"]),
    )
    optimizer = nn.SGD(settings["learning_rate"], settings["momentum"])
    if checkpoint:
        checkpoint.restore(model, optimizer)
    if args.out:
        prepare_folder(args.out)
    if args.save:  # perhaps into that folder
        check_writable(args.save)

    print(f"{dataset.name}: {len(dataset.y_train)} images to train, {len(dataset.y_test)} to test")
    layers = f"{dataset.x_train.shape[1]} inputs, {settings['activation']} layers of "
    layers += f"{', '.join(map(str, settings['hidden']))}, {CLASSES} classes, "
    print(f"{layers}{'with' if settings['batch_norm'] else 'without'} batch normalisation")
    records = nn.fit(
        model,
        optimizer,
        dataset.x_train,
        dataset.y_train,
        epochs=args.epochs or (None if args.steps else DEFAULT_EPOCHS),
        steps=args.steps,
        batch_size=settings["batch_size"],
        seed=settings["seed"],
        start=checkpoint.step if checkpoint else 0,
        test=(dataset.x_test, dataset.y_test),
        progress=not args.no_progress,
    )
    print_records(records)
    if args.save:
        step, seed = records[-1].step, settings["seed"]
        nn.save_checkpoint(args.save, model, optimizer, step=step, seed=seed, settings=settings)
        print(f"Model: {args.save}")
    if args.out:
        rows = [record._asdict() for record in records]
        print(f"Results: {write_json(args.out, {'settings': settings, 'records': rows})}")
        figure, (axes,) = new_figure(1)
        label = "with BN" if settings["batch_norm"] else "without BN"
        accuracy = [record.accuracy or 0.0 for record in records]
        plot_accuracy(axes, {label: ([record.step for record in records], accuracy)})
        print(f"Figure: {write_figure(args.out, figure)}")


def limit_threads(threads: int) -> None:
    """Let bncpu and the BLAS behind NumPy's matrix products use that many threads."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError('--threads: needs threadpoolctl; pip install "bncpu[train]"') from error
    bncpu.set_num_threads(threads)
    threadpool_limits(threads, user_api="blas")


def training_settings(args: argparse.Namespace, checkpoint: nn.Checkpoint | None) -> dict[str, Any]:
    """Return DEFAULTS, overruled by the checkpoint, overruled by the command line."""
    settings = dict(DEFAULTS)
    for name in DEFAULTS:
        if checkpoint and name in checkpoint.settings:
            try:
                settings[name] = setting_from_file(name, checkpoint.settings[name])
            except (argparse.ArgumentTypeError, RecursionError) as error:
                raise ValueError(
                    f"{checkpoint.path}: its setting of {name} is damaged; {error}"
                ) from error
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    if settings["batch_norm"] and settings["batch_size"] == 1:
        source = "--batch-size"
        if checkpoint and args.batch_size is None and "batch_size" in checkpoint.settings:
            source = f"{checkpoint.path}: its setting of batch_size"
        raise ValueError(
            f"{source}: batch normalisation needs at least 2 examples in a batch; got 1; "
            "take more, or --no-batch-norm"
        )
    return settings


def setting_from_file(name: str, value: Any) -> Any:
    """Return a setting of a file as the command line would have read it, or refuse it as that."""
    if name in NUMBERS:
        return NUMBERS[name](json.dumps(value))
    if name == "hidden":
        ok, what = isinstance(value, list) and bool(value), "a list of sizes"
    elif name == "batch_norm":
        ok, what = isinstance(value, bool), "true or false"
    else:
        ok, what = value in CHOICES[name], f"one of {', '.join(CHOICES[name])}"
    if not ok:
        raise argparse.ArgumentTypeError(f"expected {what}; got {json.dumps(value):.60}")
    return [positive(json.dumps(size)) for size in value] if name == "hidden" else value


def print_records(records: Sequence[nn.Record]) -> None:
    """Print a table of at most TABLE_ROWS records and the last one."""
    print(f"{'step':>8}  {'loss':>8}  {'test accuracy':>13}")
    stride = math.ceil(len(records) / TABLE_ROWS)
    rows = list(records[::stride])
    if rows[-1] is not records[-1]:
        rows.append(records[-1])
    for record in rows:
        loss = "" if record.loss is None else f"{record.loss:.4f}"
        print(f"{record.step:8d}  {loss:>8}  {record.accuracy:13.2%}")
