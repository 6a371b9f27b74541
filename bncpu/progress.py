"""A progress bar on stderr, by tqdm, or something that behaves like one and shows nothing."""

import sys
from typing import Any, Protocol


class Progress(Protocol):
    """What is told of every step in the place of a bar; `update` counts them as tqdm's does."""

    def update(self, n: int = 1) -> Any:
        """Count n more steps."""


def bar(
    total: int,
    title: str,
    show: bool | Progress,
    *,
    start: int = 0,
    unit: str = "step",
    unit_scale: bool = False,
) -> Any:
    """Return a tqdm bar for a with statement; `update(n=1)` and `set_postfix_str` move it.

    In its place, `show` may be an object with `update`, which then is told of each step.

    Raises
    ------
    ImportError
        If one is to be shown and tqdm is not installed.
    TypeError
        If `show` is neither a bool nor such an object.
    """
    if callable(getattr(show, "update", None)):
        return _Told(show)
    if not isinstance(show, bool):
        raise TypeError(
            f"progress: expected True, False or an object with update(); got {show!r:.60}"
        )
    if not show:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('progress: needs tqdm; pip install "bncpu[train]"') from error
    # A log file wants a line now and then, not ten a second.
    wait = 0.1 if sys.stderr.isatty() else 5.0
    return tqdm(
        total=total,
        initial=start,
        desc=title,
        unit=unit,
        unit_scale=unit_scale,
        file=sys.stderr,
        mininterval=wait,
    )


class _NoBar:
    """A progress bar that shows nothing."""

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        pass


class _Told(_NoBar):
    """A progress bar that somebody else shows."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def update(self, n: int = 1) -> None:
        self._progress.update(n)
