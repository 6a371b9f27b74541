"""The command bncpu: info, bench, train, moments, reproduce.

Nothing is computed here: a command reads its arguments, calls the package, prints the result. An
error is one line on stderr and exit status 2, an interrupt 130, a reader that has gone away 141 and
no line; files are written whole or not at all, and whatever can be refused is refused before the
work begins. Under mpiexec, with --distributed, rank 0 alone prints and writes, and whoever fails
ends all.
"""

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import bncpu
from bncpu import bench as measuring
from bncpu import data, distributed, nn, population
from bncpu.atomic import atomic_write, check_writable
from bncpu.backends import DEVICES, NoGPUError, module_on
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
    "dtype": "float32",
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
CHOICES = {"dataset": data.NAMES, "activation": tuple(ACTIVATIONS), "dtype": ("float32", "float64")}
TABLE_ROWS = 20
# For which a rank that has failed waits for rank 0 to tell of it, if it is the same to all.
RANK_0_SECONDS = 0.5


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, as the head of this file lists them.

    On one of several ranks an error does not return: it ends them all.
    """
    ranks = Ranks()
    try:
        return run(argv, ranks)
    except BaseException:
        # A bug, of which the interpreter tells; but at its end it would wait for the other ranks.
        if ranks.size > 1:
            ranks.end_all_after(traceback.print_exc, 1)
        raise


class Ranks:
    """The ranks among which a command runs: one, until it asks for those of mpiexec."""

    def __init__(self) -> None:
        self.comm: Any = None
        self.rank, self.size = 0, 1

    def meet(self) -> None:
        """Find the others."""
        self.comm = distributed.mpi("--distributed").COMM_WORLD
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return on every rank what `make` returns on the first."""
        made = make() if self.rank == 0 else None
        return self.comm.bcast(made) if self.comm else made

    def say(self, text: str) -> None:
        """Print a line, on the first rank."""
        if self.rank == 0:
            print(text, flush=self.size > 1)

    def end_all_after(self, tell: Callable[[], None], status: int) -> None:
        """Tell of an error; if there are others, end them and this one.

        Others that wait for this rank would do so for ever. An error that all have is told by the
        first, which ends the rest while they wait.
        """
        if self.rank:
            time.sleep(RANK_0_SECONDS)
        tell()
        if self.size > 1:
            sys.stderr.flush()
            self.comm.Abort(status)


def run(argv: Sequence[str] | None, ranks: Ranks) -> int:
    """Run the command; errors of the user's and of the world's become a line and a status."""
    command = "bncpu"

    def complain(text: str, status: int) -> int:
        where = f"rank {ranks.rank}: " if ranks.rank else ""
        line = f"{command}: {where}{' '.join(text.split())}"
        ranks.end_all_after(lambda: print(line, file=sys.stderr), status)
        return status

    try:
        try:
            args, unknown = parser().parse_known_args(argv)
            command = f"bncpu {args.command}"
            # Told here and not by parse_args, the line begins with the command's name.
            if unknown:
                raise ValueError(f"unrecognized arguments: {' '.join(unknown)}")
            if getattr(args, "distributed", False):
                ranks.meet()
            args.run(args, ranks)
        finally:
            print(end="", flush=True)  # now, while an error of stdout can still be told
        return 0
    except KeyboardInterrupt:
        return complain("interrupted", 130)
    except BrokenPipeError:
        give_up_stdout()
        ranks.end_all_after(lambda: None, 141)
        return 141  # as if by SIGPIPE, what a shell expects of `bncpu ... | head`
    except OSError as error:
        give_up_stdout()
        # str(error) may begin with a number in brackets.
        text = error.strerror or str(error)
        return complain(f"{error.filename}: {text}" if error.filename else text, 2)
    except MemoryError as error:
        return complain(f"not enough memory; {error or 'take a smaller model'}", 2)
    except (ValueError, ImportError, OverflowError, FloatingPointError, NoGPUError) as error:
        return complain(str(error), 2)


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

    def command(
        name: str, run: Callable[[Any, Ranks], None], summary: str, examples: str
    ) -> Parser:
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
        "  bncpu train --load run.safetensors --epochs 5   (goes on, bit for bit)\n"
        "  mpiexec -n 4 bncpu train --distributed --epochs 5 --save run.safetensors\n"
        "  mpiexec -n 2 bncpu train --distributed --epochs 9 --save run.safetensors --resume",
    )
    train_arguments(sub)

    sub = command(
        "moments",
        moments,
        "compute each channel's mean and variance over .npy files, larger than memory if need be",
        "  bncpu moments images.npy\n"
        "  bncpu moments part0.npy part1.npy --axis -1 --out population.npz\n"
        "  mpiexec -n 4 bncpu moments --distributed part*.npy",
    )
    sub.add_argument("files", nargs="+", metavar="FILE", help="arrays with the same channels")
    sub.add_argument("--axis", type=axes, default=1, metavar="N,...", help="channels (default: 1)")
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("moments.npz"),
        metavar="FILE",
        help="gets count, mean, var and m2 (default: moments.npz)",
    )
    sub.add_argument(
        "--distributed",
        action="store_true",
        help="under mpiexec: the ranks share the files, or if they are given different ones, each "
        "reads its own",
    )
    sub.add_argument("--threads", type=positive, metavar="N", help="default: as bncpu info says")
    sub.add_argument("--no-progress", action="store_true", help="show no progress bar")

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
    setting("batch_size", "examples in a step, of all ranks together", metavar="N")
    setting("learning_rate", "of plain gradient descent", metavar="X")
    setting("momentum", "0 to less than 1", metavar="X")
    setting("dtype", "of data, weights and arithmetic")
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
        "--device", choices=DEVICES, default="cpu", help="NumPy or CuPy arrays (default: cpu)"
    )
    how.add_argument(
        "--threads", type=positive, metavar="N", help="of bncpu and NumPy's BLAS (default: theirs)"
    )
    how.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write results.json and figure.png there"
    )
    how.add_argument(
        "--save", type=Path, metavar="FILE", help="write the model as safetensors, every epoch"
    )
    start = how.add_mutually_exclusive_group()
    start.add_argument("--load", type=Path, metavar="FILE", help="go on from a file of --save")
    start.add_argument(
        "--resume",
        action="store_true",
        help="go on from the file of --save, which a run left that has ended too soon, until there "
        "are as many steps or epochs in all; the number of ranks may be another",
    )
    how.add_argument(
        "--distributed",
        action="store_true",
        help="under mpiexec: every rank takes a shard of the data; rank 0 prints and writes",
    )
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


def axes(text: str) -> Any:
    """Read the number of an axis, or several between commas."""
    what = "an axis, or several as 1,2,3"
    numbers = tuple(number(part, int, lambda _: True, what) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


NUMBERS = {"batch_size": positive, "learning_rate": rate, "momentum": fraction, "seed": natural}


def info(_: argparse.Namespace, __: Ranks) -> None:
    """Print the configuration."""
    bncpu.show_config()


def bench(args: argparse.Namespace, _: Ranks) -> None:
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
        device=args.device,
        against=args.against,
        quick=args.quick,
        in_cache=args.in_cache,
        json_path=args.json,
        plot_path=args.plot,
    )


def reproduce(args: argparse.Namespace, _: Ranks) -> None:
    """Run an experiment of the paper."""
    out = args.out or Path(f"bncpu-{args.name}")
    EXPERIMENTS[args.name](out, quick=args.quick, seed=args.seed, progress=not args.no_progress)


def moments(args: argparse.Namespace, ranks: Ranks) -> None:
    """Compute population statistics of files, print them, and write them."""
    files = population.open_files(args.files, args.axis)
    shape = files[0].channels.shape
    part, parts = 0, 1
    if ranks.comm:
        lists, shapes = zip(*ranks.comm.allgather((args.files, shape)), strict=True)
        if len(set(shapes)) > 1:
            raise ValueError(f"FILE: expected the same channels on every rank; got {shapes}")
        if all(each == lists[0] for each in lists):
            part, parts = ranks.rank, ranks.size
    if ranks.rank == 0:
        check_writable(args.out)
    total = population.file_moments(
        files,
        part=part,
        parts=parts,
        num_threads=args.threads,
        progress=not args.no_progress and ranks.rank == 0,
    )
    if ranks.comm:
        total = distributed.merge_moments(total, comm=ranks.comm)
    if total.count == 0:
        raise ValueError("FILE: expected at least one value per channel; got none")
    if ranks.rank == 0:
        with atomic_write(args.out) as file:
            np.savez(file, count=total.count, mean=total.mean, var=total.var(), m2=total.m2)
    ranks.say(f"{total.count} values in each of {total.mean.size} channels")
    ranks.say(f"{'channel':>8}  {'mean':>12}  {'std':>12}")
    for c, (mean, var) in enumerate(zip(total.mean.flat, total.var().flat, strict=True)):
        if c == TABLE_ROWS:
            ranks.say(f"{'...':>8}")
            break
        ranks.say(f"{c:8d}  {mean:12.6g}  {math.sqrt(var):12.6g}")
    ranks.say(f"Moments: {args.out}")


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """Train a network, print its accuracy by step, and write what is asked for."""
    if ranks.comm and args.device != "cpu":
        raise ValueError("--device: ranks train on the CPU; leave out --distributed, or --device")
    module = module_on(args.device)
    checkpoint = ranks.from_first(lambda: checkpoint_to_go_on_from(args))
    settings = training_settings(args, checkpoint)
    of_first = ranks.from_first(lambda: settings)
    if settings != of_first:
        raise ValueError(f"expected the settings of rank 0, {of_first}; got {settings}")
    if args.threads:
        limit_threads(args.threads)
    part = {"part": ranks.rank, "parts": ranks.size}
    dataset = data.load(settings["dataset"], args.data_dir, **part)
    x_train, x_test = (x.astype(settings["dtype"]) for x in (dataset.x_train, dataset.x_test))
    activation, gain = ACTIVATIONS[settings["activation"]]
    sizes = [x_train.shape[1], *settings["hidden"], CLASSES]
    if checkpoint:
        checkpoint.check_sizes(sizes)  # before anything is allocated on the word of the file
    model = nn.fully_connected(
        sizes,
        activation=activation,
        batch_norm=settings["batch_norm"],
        gain=gain,
        rng=np.random.default_rng(settings["seed"]),
        dtype=settings["dtype"],
        comm=ranks.comm,
        device=args.device,
    )
    optimizer = nn.SGD(settings["learning_rate"], settings["momentum"])
    if checkpoint:
        checkpoint.restore(model, optimizer)
    counts = [len(x_train), len(x_test)]
    if ranks.comm:  # and so nothing is written before every rank has its shard
        counts = [sum(shards) for shards in zip(*ranks.comm.allgather(counts), strict=True)]
    start = checkpoint.step if checkpoint else 0
    steps = steps_to_take(args, start, nn.steps_per_epoch(counts[0], settings["batch_size"]))
    if ranks.rank == 0:
        if args.out:
            prepare_folder(args.out)
        if args.save:  # perhaps into that folder
            check_writable(args.save)

    def save(record: nn.Record) -> None:
        if args.save and ranks.rank == 0 and record.step > start:
            how = {"step": record.step, "seed": settings["seed"], "settings": settings}
            nn.save_checkpoint(args.save, model, optimizer, **how)

    ranks.say(f"{dataset.name}: {counts[0]} images to train, {counts[1]} to test")
    layers = f"{sizes[0]} inputs, {settings['activation']} layers of "
    layers += f"{', '.join(map(str, settings['hidden']))}, {CLASSES} classes, "
    ranks.say(f"{layers}{'with' if settings['batch_norm'] else 'without'} batch normalisation")
    if ranks.comm:
        ranks.say(f"{ranks.size} ranks share each batch of {settings['batch_size']}")
    x_train, y_train, x_test, y_test = (
        module.asarray(array) for array in (x_train, dataset.y_train, x_test, dataset.y_test)
    )
    records = nn.fit(
        model,
        optimizer,
        x_train,
        y_train,
        steps=steps,
        batch_size=settings["batch_size"],
        seed=settings["seed"],
        start=start,
        test=(x_test, y_test),
        callback=save,
        progress=not args.no_progress and ranks.rank == 0,
        comm=ranks.comm,
    )
    if ranks.rank:
        return
    print_records(records)
    if args.save:
        print(f"Model: {args.save}")
    if args.out:
        rows = [record._asdict() for record in records]
        print(f"Results: {write_json(args.out, {'settings': settings, 'records': rows})}")
        figure, (axes,) = new_figure(1)
        label = "with BN" if settings["batch_norm"] else "without BN"
        accuracy = [record.accuracy or 0.0 for record in records]
        plot_accuracy(axes, {label: ([record.step for record in records], accuracy)})
        print(f"Figure: {write_figure(args.out, figure)}")


def checkpoint_to_go_on_from(args: argparse.Namespace) -> nn.Checkpoint | None:
    """Read the file of --load, or with --resume that of --save."""
    if args.resume and not args.save:
        raise ValueError("--resume: goes on from the file of --save, and there is no --save")
    path = args.save if args.resume else args.load
    return nn.read_checkpoint(path) if path else None


def steps_to_take(args: argparse.Namespace, start: int, per_epoch: int) -> int:
    """Return the length of the training, with --resume of what is left of it."""
    steps: int = args.steps or per_epoch * (args.epochs or DEFAULT_EPOCHS)
    if not args.resume:
        return steps
    if steps <= start:
        raise ValueError(
            f"--resume: {args.save} has taken {start} steps, and {steps} are asked for in all; ask "
            "for more"
        )
    return steps - start


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
