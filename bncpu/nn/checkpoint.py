"""Checkpoints: a model, its optimizer's velocity and the place in the training, in one file.

The format is safetensors, which holds arrays and a little text and can run no code when read. The
model's arrays have PyTorch's names, so that other programs can read them; a velocity has its
parameter's name after "velocity.". Equal runs write equal files, byte for byte.
"""

import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

from bncpu.atomic import atomic_write
from bncpu.layer import BatchNorm
from bncpu.nn.base import Array, Layer, check_state
from bncpu.nn.containers import Sequential
from bncpu.nn.optimizers import SGD

# The description is one JSON text under one key, because safetensors writes keys in random order.
KEY, VERSION = "bncpu", 1
VELOCITY = "velocity."
# Beyond it a float64, such as the step on a figure's axis, can no longer tell a step from the next.
MAX_STEP = 2**53


class Checkpoint(NamedTuple):
    """What a checkpoint file holds.

    `step` and `seed` are the `start` and `seed` with which `fit` goes on; `architecture` lists the
    model's layers; `settings` is whatever the writer wanted to find again.
    """

    path: str
    step: int
    seed: int
    architecture: list[str]
    settings: dict[str, Any]
    model: dict[str, Array]
    velocity: dict[str, Array]

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Refuse a file whose weights are not those of `fully_connected` layers of these sizes.

        No model is needed for it: whoever has the sizes from the file itself should not make
        arrays that large before knowing that the file holds them.

        Raises
        ------
        ValueError
            If a layer's weights have another shape, or there are more or fewer of them.
        """
        # Numbers without leading zeros are in order by length first: 3.weight before 12.weight.
        names = sorted(
            (name for name, value in self.model.items() if value.ndim == 2),
            key=lambda name: (len(name), name),
        )
        theirs = [self.model[name].shape for name in names]
        ours = [(outputs, inputs) for inputs, outputs in pairwise(sizes)]
        for i, (there, here) in enumerate(zip_longest(theirs, ours)):
            if there != here:
                raise ValueError(
                    f"{self.path}: another architecture; the weights of linear layer {i} have "
                    f"shape {there or 'none'} in the file and {here or 'none'} in the model"
                )

    def restore(self, model: Layer, optimizer: SGD) -> None:
        """Load the arrays into a model and an optimizer; on an error neither has changed.

        Raises
        ------
        ValueError
            If the model's layers are not those of the file.
        """
        here = architecture(model)
        for i in range(max(len(here), len(self.architecture))):
            theirs = self.architecture[i] if i < len(self.architecture) else "no layer"
            ours = here[i] if i < len(here) else "no layer"
            if theirs != ours:
                raise ValueError(
                    f"{self.path}: another architecture; layer {i} is {theirs} in the file and "
                    f"{ours} in the model"
                )
        try:
            if self.velocity:
                check_state(model.parameters(), self.velocity)
            model.load_state_dict(self.model)
            optimizer.load_state_dict(self.velocity, model)
        except ValueError as error:
            raise ValueError(f"{self.path}: does not fit the model; {error}") from error


def save_checkpoint(
    path: str | os.PathLike[str],
    model: Layer,
    optimizer: SGD,
    *,
    step: int,
    seed: int,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, whole or not at all.

    Parameters
    ----------
    path : path
        Replaced if it is there. Its folder must exist.
    model, optimizer
        Their arrays are written.
    step, seed : int
        Where the training stands: steps taken, and the seed of the order of the examples.
    settings : mapping, optional
        Anything that JSON can hold.

    Raises
    ------
    OSError
        If the file cannot be written.
    ImportError
        If the safetensors library is not installed.
    """
    serialize = _safetensors("numpy").save
    arrays = model.state_dict()
    arrays |= {VELOCITY + name: value for name, value in optimizer.state_dict().items()}
    description = {
        "version": VERSION,
        "step": step,
        "seed": seed,
        "architecture": architecture(model),
        "settings": dict(settings or {}),
    }
    content = serialize(arrays, {KEY: json.dumps(description)})
    with atomic_write(path) as file:
        file.write(content)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint that `save_checkpoint` wrote.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is damaged, cut short, or not a checkpoint of bncpu.
    ImportError
        If the safetensors library is not installed.
    """
    safetensors = _safetensors()
    path = os.fspath(path)
    with open(path, "rb"):  # noqa: PTH123  a missing file is an OSError with the path in it
        pass
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            description = _description(path, file.metadata() or {})
            names = list(file.keys())
            for name in names:
                dtype = file.get_slice(name).get_dtype()
                if dtype not in ("F32", "F64", "I64"):
                    raise ValueError(f"{path}: {name:.80} has dtype {dtype}, which no layer has")
            arrays = {name: _array(path, file, name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: damaged, cut short, or not a safetensors file ({error})"
        ) from error
    return Checkpoint(
        path,
        description["step"],
        description["seed"],
        description["architecture"],
        description["settings"],
        {name: value for name, value in arrays.items() if not name.startswith(VELOCITY)},
        {
            name.removeprefix(VELOCITY): value
            for name, value in arrays.items()
            if name.startswith(VELOCITY)
        },
    )


def _description(path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the checked description in a file's metadata."""
    if KEY not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not a checkpoint of bncpu")
    try:
        description = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its description is damaged ({error})") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path}: its description is damaged (not a mapping)")
    version = description.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"{path}: a checkpoint of version {version!s:.40}; this bncpu reads version {VERSION}"
        )
    for name, kind in (("step", int), ("seed", int), ("architecture", list), ("settings", dict)):
        value = description.get(name)
        bad = type(value) is not kind or (kind is int and description[name] < 0)
        if bad or (name == "step" and description[name] > MAX_STEP):
            raise ValueError(f"{path}: its description is damaged ({name} is {value!r:.40})")
    for line in description["architecture"]:
        if not isinstance(line, str):
            raise ValueError(f"{path}: its description is damaged (a layer is {line!r:.40})")
    return description


def _array(path: str, file: Any, name: str) -> Array:
    """Return an array of an opened file; what no array can be made of is a ValueError."""
    try:
        array: Array = file.get_tensor(name)
    except (ValueError, OverflowError, MemoryError) as error:  # a size of 2**60, beside one of 0
        raise ValueError(f"{path}: damaged; {name:.80}: {error}") from error
    return array


def architecture(model: Layer) -> list[str]:
    """Describe each layer in a line that is equal for equal architectures, dtype included.

    A line of a container tells all that is inside it. A model that is no `Sequential` is one line.
    """
    return [
        _describe(layer) for layer in (model.layers if isinstance(model, Sequential) else [model])
    ]


def _describe(layer: Layer | BatchNorm) -> str:
    # The repr of a BatchNorm has its eps and momentum, which leave no trace in names and shapes. A
    # synchronised one is told as a plain one: where its batch lies is no matter of architecture.
    dtypes = {str(value.dtype) for value in layer.state_dict().values() if value.dtype.kind == "f"}
    return " ".join([repr(layer).replace("SyncBatchNorm(", "BatchNorm("), *sorted(dtypes)])


def _safetensors(submodule: str = "") -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError('checkpoints: need safetensors; pip install "bncpu[train]"') from error
    return getattr(safetensors, submodule) if submodule else safetensors
