"""`bncpu train`: a fully connected network, trained by bncpu.nn."""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bncpu
from bncpu import data, nn
from bncpu.atomic import check_writable
from bncpu.backends import DEVICES, module_on
from bncpu.cli.numbers import fraction, natural, positive, rate
from bncpu.cli.ranks import Ranks
from bncpu.experiments.figures import new_figure, plot_accuracy
from bncpu.experiments.results import prepare_folder, write_figure, write_json

SUMMARY = "train a fully connected network, with or without batch normalisation"
EXAMPLES = """\
  bncpu train --epochs 10
  bncpu train --no-batch-norm --learning-rate 0.5 --steps 2000 --out without
  bncpu train --dataset mnist --data-dir ~/data --hidden 300 100 --activation relu
  bncpu train --epochs 5 --save run.safetensors
  bncpu train --load run.safetensors --epochs 5   (goes on, bit for bit)
  mpiexec -n 4 bncpu train --distributed --epochs 5 --save run.safetensors
  mpiexec -n 2 bncpu train --distributed --epochs 9 --save run.safetensors --resume"""

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
NUMBERS = {"batch_size": positive, "learning_rate": rate, "momentum": fraction, "seed": natural}
TABLE_ROWS = 20


def add_arguments(sub: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace, ranks: Ranks) -> None:
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
