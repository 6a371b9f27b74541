"""A progress bar on stderr, by tqdm, or something that behaves like one and shows nothing."""

import sys
from typing import Any


def bar(
    total: int,
    title: str,
    show: bool,
    *,
    start: int = 0,
    unit: str = "step",
    unit_scale: bool = False,
) -> Any:
    """Return a tqdm bar for a with statement; `update(n=1)` and `set_postfix_str` move it.

    Raises
    ------
    ImportError
        If one is to be shown and tqdm is not installed.
    """
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
