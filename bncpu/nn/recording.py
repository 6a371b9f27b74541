"""Records of activations: what layers inside a model are given, while the model runs as ever.

No hooks in the layers: for as long as somebody looks, a layer's forward is one that takes a note
first.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from bncpu.backends import to_numpy
from bncpu.layer import BatchNorm
from bncpu.nn.base import Array, Layer, layers_of


@contextmanager
def recording(model: Layer, *layers: Layer | BatchNorm) -> Iterator[list[list[Array]]]:
    """Collect the inputs of layers inside a with statement.

    Parameters
    ----------
    model : Layer
        Behaves as without it, in training and in inference.
    *layers : Layer or BatchNorm
        At any depth inside the model; the model itself is allowed.

    Yields
    ------
    list of lists of arrays
        For each forward of the model that came to its end, the input of each of the layers in the
        order in which they were named: NumPy copies. A layer that was applied several times in one
        forward has its last input there, one that was not applied is a RuntimeError.

    Raises
    ------
    ValueError
        If one of the layers is not inside the model.

    Notes
    -----
    Every layer is as before when the with statement ends, by an exception too, and recordings may
    be nested. What is recorded takes memory until the list is gone.

    Examples
    --------
    >>> import numpy as np
    >>> from bncpu import nn
    >>> model = nn.fully_connected([4, 3, 3, 2], rng=np.random.default_rng(0))
    >>> last_sigmoid = model.layers[-2]
    >>> with nn.recording(model, last_sigmoid) as inputs:
    ...     y = model(np.ones((8, 4), np.float32))
    >>> len(inputs), inputs[0][0].shape
    (1, (8, 3))
    """
    inside = layers_of(model)
    for i, layer in enumerate(layers):
        if not any(layer is found for found in inside):
            raise ValueError(
                f"layers: expected layers inside the model; got {layer!r} at index {i}"
            )
    records: list[list[Array]] = []
    current: dict[int, Array] = {}

    def note(i: int) -> Callable[[Array], None]:
        def take(x: Array) -> None:
            current[i] = np.array(to_numpy(x))

        return take

    def finished() -> None:
        for i, layer in enumerate(layers):
            if i not in current:
                raise RuntimeError(f"recording: {layer!r} was not applied by the model's forward")
        records.append([current[i] for i in range(len(layers))])

    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            stack.enter_context(observed(layer, before=note(i)))
        stack.enter_context(observed(model, before=lambda _: current.clear(), after=finished))
        yield records


@contextmanager
def observed(
    layer: Layer | BatchNorm,
    before: Callable[[Array], None],
    after: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Call `before` with the input of every forward of a layer, and `after` when it has ended."""
    forward = layer.forward
    # An entry of the object hides the method of its class; the entry of an outer `observed` is one.
    own = vars(layer)
    outer = own.get("forward")

    def watched(x: Any, *args: Any, **options: Any) -> Array:
        before(x)
        y = forward(x, *args, **options)
        if after is not None:
            after()
        return y

    own["forward"] = watched
    try:
        yield
    finally:
        if outer is None:
            del own["forward"]
        else:
            own["forward"] = outer
