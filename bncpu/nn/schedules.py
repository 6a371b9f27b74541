"""How the learning rate falls over time: functions of the number of steps taken, and of no more.

They keep no state, so that a run goes on from a checkpoint with the rate it would have had. Any
callable serves as well: `fit` calls ``schedule(step)`` before each step.
"""

from dataclasses import dataclass

from bncpu.nn.arguments import integer, nonnegative, positive, real


@dataclass(frozen=True)
class ExponentialDecay:
    """Return rate * factor ** (step / every): a little less at each step.

    Parameters
    ----------
    rate : float
        The learning rate at step 0; finite and >= 0.
    factor : float
        In (0, 1]: what is left of the rate after `every` steps.
    every : float
        In steps; finite and > 0. The paper's decay "6 times faster" is `every` / 6.

    Raises
    ------
    TypeError, ValueError
        If a number is none, or out of range.

    References
    ----------
    S. Ioffe, C. Szegedy, arXiv:1502.03167, section 4.2.1.

    Examples
    --------
    >>> from bncpu.nn import ExponentialDecay
    >>> schedule = ExponentialDecay(0.8, 0.25, 1000)
    >>> schedule(0), schedule(500), schedule(1000)
    (0.8, 0.4, 0.2)
    """

    rate: float
    factor: float
    every: float

    def __post_init__(self) -> None:
        nonnegative("rate", self.rate)
        _left("factor", self.factor)
        positive("every", self.every)

    def __call__(self, step: int) -> float:
        """Return the learning rate after so many steps."""
        return float(self.rate * self.factor ** (step / self.every))


@dataclass(frozen=True)
class StepDecay:
    """Return rate * factor ** (step // every): constant, and less after every so many steps.

    Parameters
    ----------
    rate : float
        The learning rate of the first `every` steps; finite and >= 0.
    factor : float
        In (0, 1]: by how much it is multiplied after them, and after as many again.
    every : int
        In steps, >= 1.

    Raises
    ------
    TypeError, ValueError
        If a number is none, or out of range.

    Examples
    --------
    >>> from bncpu.nn import StepDecay
    >>> schedule = StepDecay(0.5, 0.5, 1000)
    >>> schedule(999), schedule(1000), schedule(2000)
    (0.5, 0.25, 0.125)
    """

    rate: float
    factor: float
    every: int

    def __post_init__(self) -> None:
        nonnegative("rate", self.rate)
        _left("factor", self.factor)
        integer("every", self.every, 1)

    def __call__(self, step: int) -> float:
        """Return the learning rate after so many steps."""
        return float(self.rate * self.factor ** (step // self.every))


def _left(name: str, value: float) -> None:
    number = real(name, value)
    if not 0 < number <= 1:
        raise ValueError(f"{name}: expected a number in (0, 1]; got {number}")
