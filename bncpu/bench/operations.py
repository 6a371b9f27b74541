"""What is measured: operations, shapes, and the arrays that an operation runs on.

An operation's bytes are the fewest that can cross memory for it, each array once, whatever an
implementation really moves.
"""

from __future__ import annotations

import importlib
import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bncpu import cpu
from bncpu.backends import module_on
from bncpu.bench.measure import Timed
from bncpu.functional import batch_norm_train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from bncpu.bench.measure import Contender

    Array = NDArray[Any]
    Call = Callable[[], object]
    Shape = tuple[int, ...]

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

DTYPES = ("float32", "float64", "float16", "bfloat16")
LAYOUTS = ("nchw", "nhwc")

# One operation's arrays are rotated over so much memory that none of them is still in the cache
# when its turn comes again.
CACHES_TO_FILL = 2
MOST_MEMORY = 1 << 30
# Arrays of a few bytes would take a hundred thousand sets; they stay in the cache instead.
MOST_SETS = 512
# Of the machine's memory, for all arrays of a shape, those of peers included.
MEMORY_SHARE = 0.6


class Operation(NamedTuple):
    """One operation: a function of bncpu, perhaps with ReLU and with a residual ("add")."""

    function: str
    relu: bool = False
    add: bool = False

    @property
    def name(self) -> str:
        """Return what --op calls it, as train_add_relu."""
        return self.function + "_add" * self.add + "_relu" * self.relu

    @property
    def forward(self) -> bool:
        """Tell train and infer from their gradients."""
        return self.function in ("train", "infer")

    @property
    def backward(self) -> bool:
        """Tell the gradients from train, infer and moments."""
        return self.function in ("backward", "infer_backward")

    @property
    def mask(self) -> bool:
        """Tell whether the sign of the result is kept, a bit per element, for the gradient."""
        return self.add and self.function != "infer"

    @property
    def arrays(self) -> int:
        """Return how many arrays of x's size are read or written."""
        if self.function == "moments":
            return 1
        return (2 if self.forward else 3) + self.add

    @property
    def stream(self) -> str:
        """Return the streaming kernel that moves memory the most alike: copy, triad or read."""
        return {1: "read", 2: "copy"}.get(self.arrays, "triad")

    @property
    def summary(self) -> str:
        """Return a line for --help."""
        return (
            _SUMMARIES[self.function]
            + {
                (False, False): "",
                (True, False): ", with ReLU",
                (True, True): ", with residual, ReLU and mask" if self.mask else ", residual, ReLU",
            }[self.relu, self.add]
        )

    def bytes(self, size: int, itemsize: int) -> int:
        """Return the least bytes that cross memory for `size` elements."""
        return self.arrays * size * itemsize + (size // 8 if self.mask else 0)


_SUMMARIES = {
    "train": "training forward",
    "infer": "inference",
    "backward": "gradient of training",
    "infer_backward": "gradient of inference (frozen statistics)",
    "moments": "mean and variance alone",
}
OPERATIONS = {
    operation.name: operation
    for operation in (
        *(Operation("train", *form) for form in ((False, False), (True, False), (True, True))),
        *(Operation("infer", *form) for form in ((False, False), (True, False), (True, True))),
        *(Operation("backward", *form) for form in ((False, False), (True, False), (True, True))),
        *(Operation("infer_backward", *form) for form in ((False, False), (True, False))),
        Operation("moments"),
    )
}
STREAMS = {"read": 1, "copy": 2, "triad": 3}  # and the arrays that each of them moves


class Arrays(NamedTuple):
    """One set of arrays. `dy` serves as residual too; the last two are there if needed."""

    x: Array
    dy: Array
    out: Array
    dresidual: Array | None
    mask: Array | None


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the dtype of a name out of DTYPES.

    Raises
    ------
    ImportError
        If it is bfloat16, which NumPy does not have, and ml_dtypes is not installed.
    """
    if name == "bfloat16":
        try:
            importlib.import_module("ml_dtypes")  # which tells NumPy the name
        except ImportError as error:
            raise ImportError("bfloat16: needs ml_dtypes; pip install ml_dtypes") from error
    return np.dtype(name)


class Problem:
    """The arrays of one shape, several sets of them, handed out in rotation.

    Parameters
    ----------
    shape : tuple of ints
        (N, C), (N, C, L) or (N, C, H, W), whatever the layout.
    dtype : str
        One of DTYPES.
    layout : {"nchw", "nhwc"}
        Where the channels lie in memory: before the pixels, or last.
    operations : iterable of Operation
        What will be measured, as far as it decides which arrays are made.
    device : {"cpu", "cuda"}
        Where the arrays are: NumPy's or CuPy's.
    rotate : bool, default True
        False keeps to one set of arrays, so that small ones stay in the cache.

    Raises
    ------
    ValueError
        If the arrays do not fit the memory of the machine, or a training shape has one value per
        channel.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: str = "float32",
        layout: str = "nchw",
        operations: Iterable[Operation] = (),
        *,
        device: str = "cpu",
        rotate: bool = True,
    ) -> None:
        operations = tuple(operations)
        check_shape(shape, dtype, operations, device)
        self.device, self.module = device, module_on(device)
        self.shape, self.dtype, self.layout = shape, dtype, layout
        self.last = layout == "nhwc" and len(shape) > 2
        self.axis = -1 if self.last else 1
        self.size = math.prod(shape)
        stored = (shape[0], *shape[2:], shape[1]) if self.last else shape
        random = np.random.default_rng(0)
        kind = dtype_of(dtype)
        self.itemsize = kind.itemsize
        x, dy = (self._normal(random, stored, kind) for _ in range(2))
        self.parameters = np.dtype(np.float64 if dtype == "float64" else np.float32)
        self.gamma, self.beta = (
            self._normal(random, (shape[1],), self.parameters) for _ in range(2)
        )
        if self.size > shape[1]:
            _, self.mean, self.invstd = batch_norm_train(x, eps=EPS, axis=self.axis)
        else:  # inference and moments of one value per channel
            self.mean, self.invstd = self.module.zeros(shape[1]), self.module.ones(shape[1])
        self.var = np.maximum(1 / self.invstd**2 - EPS, 0.0)
        dresidual = any(op.add and op.backward for op in operations)
        mask = any(op.mask for op in operations)

        def written() -> Array:
            # Filled, so that its pages are there before the clock runs. Not by zeros(): its pages
            # would not be those that NumPy asks for in empty().
            if self.device == "cuda":
                zeros: Array = self.module.zeros(x.shape, kind)
                return zeros
            array = np.empty_like(x)
            array.fill(0)
            return array

        self.sets = [
            Arrays(
                x.copy(),
                dy.copy(),
                written(),
                written() if dresidual else None,
                self.module.asarray(random.integers(0, 256, (self.size + 7) // 8, np.uint8))
                if mask
                else None,
            )
            for _ in range(_sets(x.nbytes, self.cache) if rotate else 1)
        ]
        self._turn = 0

    def rotating(self, calls: Sequence[Call]) -> Call:
        """Return one call that takes its turn through the calls of all sets.

        All contenders move on the same place, so that none begins on the arrays that another has
        just left in the cache.
        """

        def call() -> object:
            self._turn = (self._turn + 1) % len(calls)
            return calls[self._turn]()

        return call

    def timed(self, call: Call) -> Contender:
        """Return a call as a contender, by the clock of the device."""
        clock: Any = Timed if self.device == "cpu" else _gpu().Timed
        contender: Contender = clock(call)
        return contender

    def stream(self, operation: Operation) -> str:
        """Return the kind of streaming kernel that an operation is measured against."""
        return operation.stream if self.device == "cpu" else "copy"

    @property
    def level(self) -> str:
        """Return what the kernels are compiled for."""
        return cpu.level if self.device == "cpu" else str(_gpu().level())

    @property
    def cache(self) -> int:
        """Return the bytes of the last cache before memory."""
        return cpu.cache_sizes().l3 if self.device == "cpu" else int(_gpu().cache_bytes())

    def _normal(self, random: np.random.Generator, shape: Shape, kind: np.dtype[Any]) -> Array:
        if self.device == "cpu":
            return random.standard_normal(shape, np.float32).astype(kind)
        numbers: Array = _gpu().normal(random, shape, kind)
        return numbers

    @property
    def from_memory(self) -> bool:
        """Tell whether rotation is long enough for every array to come from memory."""
        array = self.size * self.itemsize
        return len(self.sets) * array >= CACHES_TO_FILL * self.cache


def check_shape(
    shape: Shape, dtype: str, operations: Iterable[Operation], device: str = "cpu"
) -> None:
    """Raise ValueError for a shape on which the operations cannot be measured."""
    trains = any(operation.function in ("train", "backward") for operation in operations)
    if trains and math.prod(shape) == shape[1]:
        raise ValueError(
            f"shape {shape}: training needs more than one value per channel; "
            "take a larger one, or measure infer"
        )
    # x, dy, out, dresidual, and as many for the results of a peer.
    needed = 6 * math.prod(shape) * dtype_of(dtype).itemsize
    there = _machine_memory() if device == "cpu" else float(_gpu().free_memory())
    if needed > MEMORY_SHARE * there:
        raise ValueError(
            f"shape {shape}: needs {needed / 1e9:.1f} GB for its arrays, of this "
            f"{'machine' if device == 'cpu' else 'GPU'}'s {there / 1e9:.1f} GB; take a smaller one"
        )


def _machine_memory() -> float:
    """Return the bytes of memory of the machine; infinity where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def _gpu() -> Any:
    # Imports CuPy, which is absent where no GPU is asked for.
    return importlib.import_module("bncpu.bench.gpu")


def _sets(array: int, cache: int) -> int:
    """Return over how many sets to rotate arrays of so many bytes."""
    fill = math.ceil(CACHES_TO_FILL * cache / array)
    return max(1, min(fill, MOST_MEMORY // (3 * array), MOST_SETS))
