"""How far results are from the truth: bncpu, its bounds and PyTorch beside each other.

    python benchmarks/accuracy.py --out docs      # some minutes; --quick: some seconds

The tables of docs/accuracy.md, as Markdown, and its figure: for each set of adversarial values
(tests/adversarial.py) the largest error, over some shapes and all levels, of each result, what the
contract allows there (tests/error_bounds.py), and PyTorch's error. The truth is exact
(tests/exact.py) and is that of the same input, so what the input has lost to rounding counts for
nobody. Not a test: tests/test_error_bounds.py is.

PyTorch gets the same arrays, and gamma and beta as bncpu has them (of 16-bit types: float32, which
PyTorch calls mixed). Each backward is given the exact statistics in the type that its own forward
returns them in: float64 for bncpu; for PyTorch float32, unless x is float64.
"""

import argparse
import importlib.util
import io
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

import bncpu.cpu
from bncpu.atomic import atomic_write
from bncpu.bench.figure import COLORS, new_figure

TESTS = Path(__file__).parents[1] / "tests"
sys.path.append(str(TESTS))
import adversarial  # noqa: E402
import error_bounds  # noqa: E402
from measured_errors import EPS, QUANTITIES, Given, Layout, Problem, run  # noqa: E402

DTYPES = {"float32": np.float32, "float64": np.float64}
DTYPES |= {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LAYOUTS = (Layout(8, 49), Layout(5, 1000), Layout(20_001, 1), Layout(3, 23_457))
QUICK_LAYOUTS = (Layout(33, 4),)
SHAPES = (Layout(32, 1), Layout(32, 49), Layout(32, 784), Layout(32, 12_544), Layout(16, 65_536))
# Where dy is next to nothing, so is dx, and has no digits to compare.
DY_SETS = [name for name in adversarial.DY if name != "tiny"]
SHOWN = ("mean", "invstd", "y", "dgamma", "dbeta", "dx")
RATIOS = tuple(10.0**k for k in range(9))
COUNTS = (2, 8, 32, 128, 512, 2048, 8192, 32_768, 131_072, 1_048_576)
QUICK_COUNTS = (2, 32, 512)


def torch_results(torch, p):
    """Return PyTorch's results for a problem, by the same names."""

    def tensor(a):
        a = np.ascontiguousarray(a)
        if a.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a)

    def array(t):
        if t.dtype == torch.bfloat16:
            return t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return t.numpy()

    x, dy = tensor(p.x), tensor(p.dy)
    gamma, beta = (tensor(a) for a in p.given[:2])
    y, mean, invstd = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
    with np.errstate(over="ignore"):
        given = [tensor(a.astype(array(mean).dtype)) for a in p.given[2:]]
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        dy, x, gamma, None, None, *given, True, EPS, [True] * 3
    )
    results = {"mean": mean, "invstd": invstd, "y": y}
    results |= {"dgamma": dgamma, "dbeta": dbeta, "dx": dx}
    return {name: array(t) for name, t in results.items()}


def finite_errors(p, results, c):
    """Return the errors of a channel's results; infinity for what is not finite itself."""
    found = {}
    for name, got in results.items():
        of_channel = got[:, c] if got.ndim > 1 else got[c]
        if np.isfinite(np.asarray(of_channel, np.float64)).all():
            found[name] = p.errors_of({name: got}, c)[name].error
        else:
            found[name] = np.inf
    return found


class Worst:
    """The largest figures so far of every set and result: of bncpu, its bound, and PyTorch."""

    def __init__(self):
        self.of = {}
        self.used = dict.fromkeys(QUANTITIES, 0.0)  # error / bound
        self.levels = dict.fromkeys(QUANTITIES, 0.0)  # between two levels

    def take(self, p, torch):
        by_level = []
        for level in bncpu.cpu.runnable_levels():
            with bncpu.cpu.use_level(level):
                by_level.append(run(p.x, p.dy, p.given))
        others = None if torch is None else torch_results(torch, p)
        for c, name in enumerate(p.names):
            for results in by_level:
                for quantity, error in p.errors_of(results, c).items():
                    self.used[quantity] = max(self.used[quantity], error.ratio)
                    self._note(name, quantity, (error.error, error.bound, 0.0))
                    self._compare(p, c, quantity, by_level[0][quantity], results[quantity])
            if others is not None:
                for quantity, error in finite_errors(p, others, c).items():
                    self._note(name, quantity, (0.0, 0.0, error))

    def _note(self, name, quantity, figures):
        known = self.of.get((name, quantity), (0.0, 0.0, 0.0))
        self.of[name, quantity] = tuple(map(max, known, figures))

    def _compare(self, p, c, quantity, one, other):
        if one.ndim > 1:
            one, other = (adversarial.channel_of(a, c).astype(float) for a in (one, other))
        else:
            one, other = float(one[c]), float(other[c])
        apart = np.abs(one - other)
        scale = p.scale(quantity, c)
        with np.errstate(divide="ignore", invalid="ignore"):
            apart = np.where(apart == 0, 0.0, apart / scale)
        self.levels[quantity] = max(self.levels[quantity], float(apart.max()))


def table(worst, torch):
    """Print the errors of all sets, a cell for each result: bncpu, bound, PyTorch."""
    print(f"| values | {' | '.join(SHOWN)} |")
    print("|---" * (len(SHOWN) + 1) + "|")
    names = dict.fromkeys(name for name, _ in worst.of)
    for name in names:
        cells = []
        for quantity in SHOWN:
            figures = worst.of[name, quantity][: 2 if torch is None else 3]
            cells.append(" / ".join(short(f) for f in figures))
        print(f"| {name} | {' | '.join(cells)} |")


def promises():
    """Print the bounds themselves, for the shapes that images have, in units of their scales."""
    print("| dtype | (N, C, S) | m | n / d / p | mean | invstd | y | dgamma | dbeta | dx |")
    print("|---" * 10 + "|")
    one = np.ones(1)
    given = Given(gamma=one, beta=one, mean=0 * one, invstd=one)
    for name, dtype in DTYPES.items():
        for layout in SHAPES:
            dtype, m, channels = np.dtype(dtype), layout.m, 64
            sums = error_bounds.chain(dtype, layout.rows, channels, layout.run)
            mean = error_bounds.mean_error(sums, dtype, 0.0, 1.0)
            var = error_bounds.var_error(sums, dtype, 0 * one, one)
            invstd = error_bounds.invstd_error(var, one, EPS)
            statistics = {"mean_error": mean, "invstd_error": invstd}
            y = error_bounds.y_error(dtype, given, one, 2 * one, **statistics) / 3
            sizes = error_bounds.Sizes(m, 0 * one, 0 * one, m * one, m * one)
            gradients = error_bounds.parameter_gradient_errors(sums, dtype, given, sizes)
            dx = error_bounds.dx_error(sums, dtype, given, sizes, one, one, one) / 3
            errors = [mean, invstd[0], y[0], *(g[0] / m for g in gradients), dx[0]]
            counts = f"{sums.narrow} / {sums.wide} / {sums.parts}"
            shape = f"({layout.rows}, {channels}, {layout.run})"
            print(f"| {name} | {shape} | {m} | {counts} | {' | '.join(map(short, errors))} |")


def short(figure):
    return "0" if figure == 0 else f"{figure:.0e}".replace("e-0", "e-").replace("e+0", "e")


def summary(worst):
    """Print, for each result, how much of its bound was used and how far two levels were apart."""
    print(f"\n| | {' | '.join(QUANTITIES)} |")
    print("|---" * (len(QUANTITIES) + 1) + "|")
    print(f"| error / bound | {' | '.join(f'{worst.used[q]:.2f}' for q in QUANTITIES)} |")
    print(f"| between levels | {' | '.join(short(worst.levels[q]) for q in QUANTITIES)} |\n")


def with_ratio(ratio):
    """Return a set of that |mean| / std, alone."""
    return {"large mean": lambda rng, m, _dtype: rng.standard_normal(m) + ratio * 1.2345}


def curves(dtype, places, problem_at, torch):
    """Return the errors of y, its bounds and PyTorch's errors, at each place of a figure's axis."""
    rows = []
    for place in places:
        worst = Worst()
        worst.take(problem_at(place, dtype), torch)
        rows.append(next(v for (_, quantity), v in worst.of.items() if quantity == "y"))
    return np.array(rows).T


def draw(seed, torch, counts, path):
    """Draw the error of y against |mean| / std and against m, for float32 and float64."""
    figure, panels = new_figure(2, 2, 4.6, 3.3)

    def of_ratio(ratio, dtype):
        return Problem(np.random.default_rng(seed), with_ratio(ratio), dtype, Layout(5, 1000))

    def of_count(m, dtype):
        sets = adversarial.some("integers")
        return Problem(np.random.default_rng(seed), sets, dtype, Layout(2, m // 2))

    for row, name in zip(panels, ("float32", "float64"), strict=True):
        axis = {"|mean| / std, m = 5000": (RATIOS, of_ratio)}
        axis["m, values per channel (integers, mean / std = 5)"] = (counts, of_count)
        for axes, (label, (places, problem_at)) in zip(row, axis.items(), strict=True):
            figures = curves(DTYPES[name], places, problem_at, torch)
            ours, bound, theirs = np.where(figures > 0, figures, np.nan)
            axes.loglog(places, bound, "k:v", label="bound of bncpu", markersize=4)
            if torch is not None:
                axes.loglog(places, theirs, "--s", color=COLORS["torch"], label="PyTorch")
            axes.loglog(places, ours, "-o", color=COLORS["bncpu"], label="bncpu")
            axes.set_xlabel(label)
            axes.set_ylabel(f"largest error of y, {name}")
            axes.grid(alpha=0.3)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3, loc="outside lower center")
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    with atomic_write(path) as file:
        file.write(png.getvalue())


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="one table of all")
    parser.add_argument("--quick", action="store_true", help="one small shape, few points")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (0)")
    parser.add_argument("--out", type=Path, help="folder for accuracy.png; without it, no figure")
    options = parser.parse_args(arguments)
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    peer = "no PyTorch here" if torch is None else f"PyTorch {torch.__version__}"
    layouts = QUICK_LAYOUTS if options.quick else LAYOUTS
    print(f"seed {options.seed}, {peer}, levels {', '.join(bncpu.cpu.runnable_levels())};")
    print("(rows, values side by side):", ", ".join(f"({a.rows}, {a.run})" for a in layouts))
    print("\n### Bounds\n")
    promises()
    for name in options.dtype or DTYPES:
        print(f"\n### {name}: bncpu / bound" + ("" if torch is None else " / PyTorch") + "\n")
        worst = Worst()
        for layout in layouts:
            rng = np.random.default_rng(options.seed)
            problem = Problem(rng, adversarial.X, DTYPES[name], layout, dy_sets=DY_SETS)
            worst.take(problem, torch)
        table(worst, torch)
        summary(worst)
    if options.out is not None:
        counts = QUICK_COUNTS if options.quick else COUNTS
        draw(options.seed, torch, counts, options.out / "accuracy.png")


if __name__ == "__main__":
    main()
