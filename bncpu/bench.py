"""How fast bncpu is: beside textbook NumPy, PyTorch, and the speed of the memory itself.

Not a profiler, and no source of absolute times: machines drift by tens of per cent, so everything
that is compared runs in turn in one process, and only medians of the same run are set against each
other. Training is set against a streaming copy and its backward against a streaming triad
(a + b -> c): the bytes that cross memory if every array crosses it once.

The forms of the benchmark are small public functions, which the suite in benchmarks/ uses too.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import bncpu
from bncpu import cpu
from bncpu.atomic import atomic_write
from bncpu.functional import batch_norm_backward, batch_norm_train
from bncpu.threads import get_num_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import DTypeLike, NDArray

    Array = NDArray[Any]
    Shape = tuple[int, int, int, int]

EPS = 1e-5

# The batch norms of ResNet-50 for images of 224 x 224, and the four that stand for the rest:
# large maps of few channels, of many channels, middling, and small maps of very many channels.
BATCH = 32
RESNET50 = [
    (64, 112, 112),
    (64, 56, 56),
    (256, 56, 56),
    (128, 28, 28),
    (512, 28, 28),
    (256, 14, 14),
    (1024, 14, 14),
    (512, 7, 7),
    (2048, 7, 7),
]
QUICK = [(64, 112, 112), (256, 56, 56), (512, 28, 28), (2048, 7, 7)]
OPERATIONS = ("train", "backward")

# One operation's arrays are rotated over so much memory that none of them is still in the cache
# when its turn comes again.
CACHES_TO_FILL = 2
MOST_MEMORY = 1 << 30

# Between two contenders the threads of the one stop spinning, so that they do not take the cores
# of the other.
PAUSE_SECONDS = 0.005
# A fast contender runs several times in its turn, for as long as this.
TURN_SECONDS = 0.02
ROUNDS = 3
# How long an operation on a shape is measured at least, in full and with `quick`.
SECONDS = 4.0
QUICK_SECONDS = 1.0


class Row(NamedTuple):
    """What was measured of one operation on one shape: median seconds by contender.

    ``seconds["stream"]`` is the faster of the streaming kernels with and without non-temporal
    stores; `bytes` is what these move, and the least that the operation can.
    """

    shape: Shape
    operation: str
    bytes: int
    seconds: dict[str, float]

    @property
    def fraction(self) -> float:
        """Return the part of the streaming speed that bncpu reaches."""
        return self.seconds["stream"] / self.seconds["bncpu"]


class Buffers:
    """Arrays of one shape, several sets of them, handed out in rotation.

    Parameters
    ----------
    shape : tuple of ints
        (N, C, H, W).
    dtype : dtype
        float32 or float64.
    """

    def __init__(self, shape: Shape, dtype: DTypeLike) -> None:
        random = np.random.default_rng(0)
        x, dy = (random.standard_normal(shape, np.float32).astype(dtype) for _ in range(2))
        sets = math.ceil(CACHES_TO_FILL * cpu.cache_sizes().l3 / x.nbytes)
        sets = max(1, min(sets, MOST_MEMORY // (3 * x.nbytes)))
        self.shape = shape
        self.itemsize = x.itemsize
        # Outputs are filled, so that their pages are there before the clock runs.
        self.sets = [(x.copy(), dy.copy(), np.zeros_like(x)) for _ in range(sets)]
        self.gamma, self.beta = (
            random.standard_normal(shape[1], np.float32).astype(dtype) for _ in range(2)
        )
        _, self.mean, self.invstd = batch_norm_train(x, eps=EPS)
        self._turn = 0

    def turn(self) -> tuple[Array, Array, Array]:
        """Return the next x, dy and out."""
        self._turn = (self._turn + 1) % len(self.sets)
        return self.sets[self._turn]

    def bytes(self, operation: str) -> int:
        """Return the bytes that cross memory if each array of the operation does so once."""
        return {"train": 2, "backward": 3}[operation] * math.prod(self.shape) * self.itemsize


def textbook_train(x: Array, gamma: Array, beta: Array, eps: float = EPS) -> Array:
    """Return y as people write it in NumPy for (N, C, H, W), in x's precision."""
    mean = x.mean(axis=(0, 2, 3), keepdims=True)
    var = x.var(axis=(0, 2, 3), keepdims=True)
    xhat = (x - mean) / np.sqrt(var + x.dtype.type(eps))
    y: Array = gamma[None, :, None, None] * xhat + beta[None, :, None, None]
    return y


def textbook_backward(
    dy: Array, x: Array, mean: Array, invstd: Array, gamma: Array
) -> tuple[Array, Array, Array]:
    """Return dx, dgamma, dbeta as people write them in NumPy for (N, C, H, W)."""
    m = x.size // x.shape[1]
    xhat = (x - mean[None, :, None, None]) * invstd[None, :, None, None]
    dbeta = dy.sum(axis=(0, 2, 3))
    dgamma = (dy * xhat).sum(axis=(0, 2, 3))
    scale = (gamma * invstd / x.dtype.type(m))[None, :, None, None]
    dx = scale * (m * dy - dbeta[None, :, None, None] - xhat * dgamma[None, :, None, None])
    return dx, dgamma, dbeta


def contenders(
    operation: str, buffers: Buffers, num_threads: int | None = None
) -> dict[str, Callable[[], object]]:
    """Return what competes in an operation, by name; each call takes the next set of arrays.

    Parameters
    ----------
    operation : {"train", "backward"}
        The operation.
    buffers : Buffers
        The arrays.
    num_threads : int, optional
        Threads for bncpu and for the streaming kernels; PyTorch has its own setting.

    Returns
    -------
    dict of str to callable
        "bncpu", which writes into a given array; "numpy" and, if installed, "torch", which allocate
        their results, as they do for everybody; "stream" and "stream, non-temporal".
    """
    threads = get_num_threads() if num_threads is None else num_threads
    gamma, beta, mean, invstd = buffers.gamma, buffers.beta, buffers.mean, buffers.invstd
    narrow_mean, narrow_invstd = mean.astype(gamma.dtype), invstd.astype(gamma.dtype)

    def stream(non_temporal: bool) -> None:
        x, dy, out = (a.reshape(-1) for a in buffers.turn())
        if operation == "train":
            cpu.kernels.stream_copy(x, out, threads, non_temporal=non_temporal)
        else:
            cpu.kernels.stream_triad(x, dy, out, threads, non_temporal=non_temporal)

    def ours() -> None:
        x, dy, out = buffers.turn()
        if operation == "train":
            batch_norm_train(x, gamma, beta, eps=EPS, out=out, num_threads=threads)
        else:
            batch_norm_backward(dy, x, mean, invstd, gamma, out=out, num_threads=threads)

    def textbook() -> None:
        x, dy, _ = buffers.turn()
        if operation == "train":
            textbook_train(x, gamma, beta)
        else:
            textbook_backward(dy, x, narrow_mean, narrow_invstd, gamma)

    found: dict[str, Callable[[], object]] = {
        "stream": lambda: stream(non_temporal=False),
        "stream, non-temporal": lambda: stream(non_temporal=True),
        "bncpu": ours,
        "numpy": textbook,
    }
    torch = import_torch()
    if torch is not None:
        parameters = [torch.from_numpy(a) for a in (gamma, beta, narrow_mean, narrow_invstd)]

        def pytorch() -> None:
            x, dy, _ = (torch.from_numpy(a) for a in buffers.turn())
            weight, bias, save_mean, save_invstd = parameters
            if operation == "train":
                torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
            else:
                torch.ops.aten.native_batch_norm_backward(
                    *(dy, x, weight, None, None, save_mean, save_invstd, True, EPS, [True] * 3)
                )

        found["torch"] = pytorch
    return found


def import_torch() -> Any:
    """Return the module torch, or None where it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def measure(
    calls: dict[str, Callable[[], object]], seconds: float, rounds: int = ROUNDS
) -> dict[str, float]:
    """Return the median seconds of each call, all of them measured in turn.

    Parameters
    ----------
    calls : dict of str to callable
        What to time, by name. Each is called once before the clock runs.
    seconds : float
        When this much time has gone by, no further round begins.
    rounds : int, default 3
        The least number of rounds; every round is a turn of every call.
    """
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while rounds > 0 or time.perf_counter() < end:
        rounds -= 1
        for name, call in calls.items():
            time.sleep(PAUSE_SECONDS)
            turn_end = time.perf_counter() + TURN_SECONDS
            while True:
                begin = time.perf_counter()
                call()
                now = time.perf_counter()
                taken[name].append(now - begin)
                if now > turn_end:
                    break
    return {name: statistics.median(times) for name, times in taken.items()}


def measure_shape(
    shape: Shape, operation: str, dtype: DTypeLike, num_threads: int, seconds: float
) -> Row:
    """Measure one operation on one shape."""
    buffers = Buffers(shape, dtype)
    taken = measure(contenders(operation, buffers, num_threads), seconds)
    taken["stream"] = min(taken["stream"], taken.pop("stream, non-temporal"))
    return Row(shape, operation, buffers.bytes(operation), taken)


def table(rows: list[Row]) -> str:
    """Return rows as a table for people."""
    peers = [name for name in ("numpy", "torch") if name in rows[0].seconds]
    head = f"{'(N, C, H, W)':<20} {'':<9} {'bncpu':>10} {'GB/s':>6} {'of memory':>10}"
    lines = [head + "".join(f"{_PEERS[name]:>10}" for name in peers)]
    for row in rows:
        ours = row.seconds["bncpu"]
        shape = str(row.shape) if row.operation == OPERATIONS[0] else ""
        lines.append(
            f"{shape:<20} {row.operation:<9} {ours * 1e3:>7.2f} ms {row.bytes / ours / 1e9:>6.1f} "
            f"{row.fraction:>9.0%} " + "".join(f"{row.seconds[p] / ours:>9.1f}x" for p in peers)
        )
    return "\n".join(lines)


_PEERS = {"numpy": "NumPy", "torch": "PyTorch"}


def run(
    *,
    quick: bool = False,
    num_threads: int | None = None,
    dtype: str = "float32",
    json_path: str | os.PathLike[str] | None = None,
) -> None:
    """Measure training and its backward on the layers of ResNet-50, and print a table.

    Parameters
    ----------
    quick : bool, default False
        Four shapes instead of nine, in less than half a minute.
    num_threads : int, optional
        Threads; otherwise what get_num_threads says.
    dtype : {"float32", "float64"}
        Of the arrays.
    json_path : path, optional
        Where to write the figures as JSON. The file appears when it is complete, or not at all.

    Raises
    ------
    OSError
        If the JSON file cannot be written; before anything is measured.
    """
    threads = get_num_threads() if num_threads is None else num_threads
    torch = import_torch()
    with contextlib.ExitStack() as stack:
        file = None if json_path is None else stack.enter_context(atomic_write(json_path))
        if torch is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        facts = _facts(threads, dtype, torch)
        print("\n".join(f"{name:<8} {value}" for name, value in facts.items()), end="\n\n")
        todo = [
            ((BATCH, *shape), operation)
            for shape in (QUICK if quick else RESNET50)
            for operation in OPERATIONS
        ]
        rows = [
            measure_shape(shape, operation, dtype, threads, QUICK_SECONDS if quick else SECONDS)
            for shape, operation in _with_progress(todo)
        ]
        print(table(rows))
        print(
            "\nMedians of one run, every contender in turn. Of memory: the speed of a streaming"
            "\ncopy (train) or triad (backward) that moves the same bytes with the same threads."
            "\nbncpu writes into a given array; the others allocate, as they always do."
        )
        if file is not None:
            figures = [row._asdict() | {"fraction": row.fraction} for row in rows]
            text = json.dumps({**facts, "eps": EPS, "rows": figures}, indent=2)
            file.write(f"{text}\n".encode())


def _facts(threads: int, dtype: str, torch: Any) -> dict[str, str | int]:
    """Return on what the figures were taken, by name."""
    return {
        "bncpu": bncpu.__version__,
        "level": cpu.level,
        "threads": threads,
        "dtype": dtype,
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "numpy": np.__version__,
        "torch": "absent" if torch is None else torch.__version__,
    }


def _processor() -> str:
    """Return the processor's own name where Linux tells it, else the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _with_progress(todo: list[tuple[Any, str]]) -> Iterable[tuple[Any, str]]:
    """Return the same items, with a progress bar on a terminal's stderr if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return todo
    bar: Iterable[tuple[Any, str]] = tqdm(
        todo, desc="bench", unit="op", file=sys.stderr, disable=None, leave=False
    )
    return bar
