"""The contract of docs/accuracy.md: no error is larger than its bound, whatever the values are.

The truth is exact (tests/exact.py), so that float64 is held to its bounds as well; the bounds are
functions (tests/error_bounds.py), the values adversarial (tests/adversarial.py). That the bounds
can be broken is tested too, with algorithms that people do use.
"""

from fractions import Fraction

import adversarial
import error_bounds
import exact
import numpy as np
import pytest
from accuracy import assert_same_bits, tolerance
from cases import FLOATS, HALVES, LAYOUTS, lay
from measured_errors import EPS, Given, Layout, Problem, run

import bncpu
import bncpu.cpu

# Channels innermost (run 1), small maps, rows of one piece and of several; the last ones are cut
# into parts that threads share.
LAYOUTS_OF_M = [
    Layout(2, 1),
    Layout(3, 5),
    Layout(17, 1),
    Layout(33, 4),
    Layout(8, 49),
    Layout(1, 2049),
    Layout(5, 1000),
]
LARGE = [
    (np.float32, Layout(3, 23_457), ("mean/std 1e6", "halves far apart", "ascending")),
    (np.float64, Layout(3, 23_457), ("mean/std 1e6", "halves far apart", "ascending")),
    (np.float32, Layout(20_001, 1), tuple(adversarial.X)),
    (np.float64, Layout(20_001, 1), tuple(adversarial.X)),
    (np.float32, Layout(16, 62_500), ("mean/std 1e6", "ascending")),
    (np.float64, Layout(16, 62_500), ("mean/std 1e8", "outliers first, large mean")),
    (np.float32, Layout(500_000, 1), ("integers", "one huge value")),
    (np.float64, Layout(500_000, 1), ("ascending, large mean", "plain")),
]
# What a problem has beside the channels that are measured, and what may not leave its channel.
POISON = (np.nan, np.inf, -np.inf)


def assert_within_bounds(p, results, what):
    for c, name in enumerate(p.names):
        for quantity, error in p.errors_of(results, c).items():
            assert error.ratio <= 1.0, (
                f"{quantity} of '{name}' (dy '{p.dy_names[c]}'), {p.dtype} {p.layout}, {what}: "
                f"error {error.error:.3g}, bound {error.bound:.3g} in units of its scale, "
                f"{error.ratio:.3g} bounds at worst"
            )


def on_all_levels(p, threads=(2, 3, 4)):
    """Measure every level once; other numbers of threads have the same bits."""
    for level in bncpu.cpu.runnable_levels():
        with bncpu.cpu.use_level(level):
            results = run(p.x, p.dy, p.given, num_threads=1)
            assert_within_bounds(p, results, level)
            for number in threads:
                others = run(p.x, p.dy, p.given, num_threads=number)
                for name, got in others.items():
                    assert_same_bits(got, results[name], f"{name}, {level}, {number} threads")


@pytest.mark.parametrize("layout", LAYOUTS_OF_M, ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
def test_errors_are_within_bounds(rng, dtype, layout):
    shift = int(rng.integers(len(adversarial.DY)))
    on_all_levels(Problem(rng, adversarial.X, dtype, layout, shift=shift), threads=(2,))


@pytest.mark.parametrize(
    ("dtype", "layout", "names"),
    LARGE,
    ids=[f"{np.dtype(dtype)}-{layout.rows}x{layout.run}" for dtype, layout, _ in LARGE],
)
def test_errors_of_large_channels_are_within_bounds(rng, dtype, layout, names):
    on_all_levels(Problem(rng, adversarial.some(*names), dtype, layout))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_short_runs_with_gaps_are_within_bounds(rng, dtype):
    """Read in place, each run of 7 values is a row, flushed to float64 and added to the others."""
    p = Problem(rng, adversarial.X, dtype, Layout(300, 7))
    p.sums = p.sums._replace(narrow=6, wide=max(p.sums.wide, 300 + 4))
    results = run(lay("cropped", p.x), lay("cropped", p.dy), p.given)
    assert_within_bounds(p, results, "cropped")


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("layout", [Layout(17, 1), Layout(3, 5), Layout(8, 49)], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
def test_inference_and_residual_are_within_bounds(rng, dtype, layout):
    """Constants for statistics: a few roundings of each element, and one more for a residual.

    The mean and variance that are given are those of the batch, in float64.
    """
    p = Problem(rng, adversarial.X, dtype, layout)
    residual = adversarial.laid_out(p.dy_values[::-1].copy(), layout.rows)
    fixed = {"eps": EPS, "gamma": p.given.gamma}
    plain = bncpu.batch_norm_infer(p.x, p.mean, p.var, beta=p.given.beta, **fixed)
    added = bncpu.batch_norm_infer(
        p.x, p.mean, p.var, beta=p.given.beta, residual=residual, **fixed
    )
    dx = bncpu.batch_norm_infer_backward(p.dy, p.x, p.mean, p.var, **fixed).dx
    for c, name in enumerate(p.names):
        gamma, beta, mean, var = (Fraction(float(a[c])) for a in (*p.given[:3], p.var))
        scale = gamma * exact.inverse_root(var + Fraction(EPS))
        x, dy, other = p.whole_x[c], p.whole_dy[c], p.whole_dy[len(p.names) - 1 - c]
        given, values = p.given_of(c), adversarial.channel_of(residual, c).astype(float)
        z = given.gamma * p.xhat[c] + given.beta
        for y, r, lines in ((plain, 0.0, [x]), (added, values, [x, other])):
            got = adversarial.channel_of(y, c)
            errors = exact.errors_of_line(
                got, lines, [scale, Fraction(1)][: len(lines)], beta - scale * mean
            )
            bound = error_bounds.y_error(p.dtype, given, p.xhat[c], z + r, residual=r)
            assert (errors <= bound).all(), (name, "with residual" if len(lines) > 1 else "")
        dz = p.dy_values[c].astype(float)
        errors = exact.errors_of_line(adversarial.channel_of(dx, c), [dy], [scale], Fraction(0))
        size = np.abs(given.gamma * given.invstd * dz)
        assert (errors <= error_bounds.infer_dx_error(p.dtype, size, dz)).all(), name


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("layout", [Layout(33, 4), Layout(5, 1000), Layout(2500, 1)], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
def test_nan_and_inf_beside_finite_channels(rng, dtype, layout):
    """Channels between special ones have the bits that they have between ordinary ones."""
    sets = adversarial.some("plain", "mean/std 1e4", "outlier first", "integers")
    p = Problem(rng, sets, dtype, layout)
    many = len(p.names) * (len(POISON) + 1)
    own = slice(None, None, len(POISON) + 1)
    values = [np.repeat(a, len(POISON) + 1, axis=1) for a in (p.x, p.dy)]
    given = Given(*(np.repeat(a, len(POISON) + 1) for a in p.given))
    expected = run(*values, given)
    for c in set(range(many)) - set(range(many)[own]):
        for a in values:
            a[rng.integers(len(a)), c] = POISON[c % len(POISON)]
    with np.errstate(invalid="ignore", over="ignore"):
        got = run(*values, given)
    for name, result in got.items():
        channels = (slice(None), own) if name in ("y", "dx") else own
        assert_same_bits(result[channels], expected[name][channels], name)
        special = np.moveaxis(np.delete(result, own, axis=min(result.ndim - 1, 1)), -1, 0)
        assert name == "dx" or not np.isfinite(special).all(), name


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
def test_levels_differ_by_no_more_than_the_bounds(rng, dtype, shift):
    """Each is off the truth by a bound at most, so two of them differ by twice that.

    Statistics differ in their last digits, or not at all; with those of another level given, the
    sums of a backward still do.
    """
    p = Problem(rng, adversarial.X, dtype, Layout(9, 333), shift=shift)
    results = []
    for level in bncpu.cpu.runnable_levels():
        with bncpu.cpu.use_level(level):
            results.append(run(p.x, p.dy, p.given))
    for other in results[1:]:
        for c in range(len(p.names)):
            bounds = error_bounds.parameter_gradient_errors(
                p.sums, p.dtype, p.given_of(c), p.sizes_of(c)
            )
            for name, bound in zip(("dgamma", "dbeta"), bounds, strict=True):
                apart = abs(float(other[name][c]) - float(results[0][name][c]))
                assert apart <= 2 * bound, (name, p.names[c])
            bound = error_bounds.mean_error(p.sums, p.dtype, p.mean[c], np.sqrt(p.var[c]))
            assert abs(other["mean"][c] - results[0]["mean"][c]) <= 2 * bound, p.names[c]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(9, 5, 333), (700, 33), (8, 3, 9000)], ids=str)
def test_alignment_and_place_change_no_bit(rng, dtype, shape):
    """Arrays one item off, results one item off, results in the place of the input."""
    x = (rng.standard_normal(shape) + 0.3).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    y, mean, invstd = bncpu.batch_norm_train(x)
    dx, dgamma, dbeta, _ = bncpu.batch_norm_backward(dy, x, mean, invstd)
    inferred = bncpu.batch_norm_infer(x, mean, 1.0 / invstd**2)
    for layout in ("off_by_an_item", "misaligned"):
        out, _ = LAYOUTS[layout](shape, x.dtype)
        other = lay(layout, x)
        got = bncpu.batch_norm_train(other, out=out)
        for a, b in zip(got, (y, mean, invstd), strict=True):
            assert_same_bits(a, b, layout)
        got = bncpu.batch_norm_backward(lay(layout, dy), other, mean, invstd, out=out)
        for a, b in zip(got[:3], (dx, dgamma, dbeta), strict=True):
            assert_same_bits(a, b, layout)
    in_place = x.copy()
    bncpu.batch_norm_infer(in_place, mean, 1.0 / invstd**2, out=in_place)
    assert_same_bits(in_place, inferred, "y in the place of x")
    in_place = dy.copy()
    bncpu.batch_norm_backward(in_place, x, mean, invstd, out=in_place)
    assert_same_bits(in_place, dx, "dx in the place of dy")


# ---- That the bounds can be broken


def textbook(x):
    """Return mean and var as E[x^2] - E[x]^2, in x's dtype."""
    mean = x.mean(dtype=x.dtype)
    return mean, max((x * x).mean(dtype=x.dtype) - mean * mean, 0)


def without_pivot(x):
    """Return mean and var as the kernels have them, in float64 even, but about 0."""
    x = x.astype(np.float64)
    mean = x.sum() / x.size
    return mean, max((x * x).sum() - x.sum() * mean, 0.0) / x.size


def one_chain(x):
    """Return mean and var by two passes of one long chain of additions each, in x's dtype."""
    mean = np.add.accumulate(x)[-1] / x.dtype.type(x.size)
    return mean, np.add.accumulate((x - mean) ** 2)[-1] / x.dtype.type(x.size)


def uncorrected(x):
    """Return mean and var by two passes in eight lanes; the first mean's error stays."""
    lanes = x[: x.size // 8 * 8].reshape(-1, 8)
    mean = np.add.accumulate(lanes)[-1].sum() / lanes.size
    return mean, np.add.accumulate((lanes - mean) ** 2)[-1].sum() / lanes.size


@pytest.mark.parametrize(
    ("algorithm", "name", "dtype", "quantity"),
    [
        (textbook, "mean/std 1e4", np.float32, "invstd"),
        (textbook, "mean/std 1e6", np.float64, "invstd"),
        (without_pivot, "mean/std 1e6", np.float64, "invstd"),
        (one_chain, "mean/std 1e4", np.float32, "mean"),
        (one_chain, "ascending, large mean", np.float32, "mean"),
        (uncorrected, "outliers first, large mean", np.float64, "mean"),
    ],
)
def test_other_algorithms_break_the_bounds(rng, algorithm, name, dtype, quantity):
    p = Problem(rng, adversarial.some(name), dtype, Layout(1, 60_000))
    mean, var = algorithm(p.values[0])
    results = {"mean": [mean], "invstd": [1.0 / np.sqrt(float(var) + EPS)]}
    assert p.errors_of(results, 0)[quantity].ratio > 2.0
    y, ours, invstd = bncpu.batch_norm_train(p.x, *p.given[:2], eps=EPS)
    assert_within_bounds(p, {"y": y, "mean": ours, "invstd": invstd}, "bncpu")


def test_one_chain_of_gradients_breaks_the_bound(rng):
    p = Problem(rng, adversarial.some("plain"), np.float32, Layout(1, 60_000), dy_sets=["alike"])
    chain = np.add.accumulate(p.dy_values[0])[-1]
    assert p.errors_of({"dbeta": [chain]}, 0)["dbeta"].ratio > 2.0


def test_multiplied_out_breaks_the_bound_of_y(rng):
    """In float32, x * scale + (beta - mean * scale), as frameworks have it."""
    p = Problem(rng, adversarial.some("mean/std 1e4"), np.float32, Layout(8, 49))
    gamma, beta, mean, invstd = (a.astype(np.float32) for a in p.given)
    scale = gamma * invstd
    y = p.x * scale[:, None] + (beta - mean * scale)[:, None]
    assert p.errors_of({"y": y}, 0)["y"].ratio > 2.0


# ---- What the bounds say, and what they are made of


@pytest.mark.parametrize("layout", [Layout(32, 49), Layout(32, 784), Layout(32, 12_544)], ids=str)
def test_tolerance_of_the_suite_is_within_the_contract(layout):
    """What all other tests allow for ordinary float32 is less than what is promised for any."""
    sums = error_bounds.chain(np.dtype(np.float32), layout.rows, 64, layout.run)
    allowed = tolerance(np.float32, layout.m)
    var = error_bounds.var_error(sums, np.float32, np.zeros(1), np.ones(1))
    assert allowed <= error_bounds.invstd_error(var, np.ones(1), 0.0)[0]
    assert allowed <= error_bounds.mean_error(sums, np.float32, 0.0, 1.0)
    assert allowed <= sums.sum(np.float32, more=12)


@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("layout", [Layout(32, 1), Layout(32, 784), Layout(16, 65_536)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_short_formulas_are_those_of_the_functions(dtype, layout, ratio):
    """The table at the top of docs/accuracy.md, for std, invstd, gamma, xhat and dz of 1."""
    n, d, p = sums = error_bounds.chain(dtype, layout.rows, 64, layout.run)
    w, u = error_bounds.U64, error_bounds.unit(dtype).u
    is_double = dtype == np.float64
    k, r, one = n + d * is_double, (p + 1) * w * ratio, np.ones(1)
    rest = 14 * (p + 2) * w + (not is_double) * (13 * d * w + 3 * u**2 * ratio)
    given = Given(one, one, ratio * one, one)
    mean = error_bounds.mean_error(sums, dtype, ratio, 1.0)
    var = error_bounds.var_error(sums, dtype, ratio, one)
    invstd = error_bounds.invstd_error(var, one, 0.0)
    statistics = {"mean_error": mean, "invstd_error": invstd}
    y = error_bounds.y_error(dtype, given, one, one, **statistics)
    inferred = error_bounds.y_error(dtype, given, one, one)
    m = layout.m * one
    sizes = error_bounds.Sizes(layout.m, m, m, m, m)
    dgamma, dbeta = error_bounds.parameter_gradient_errors(sums, dtype, given, sizes)
    dx = error_bounds.dx_error(sums, dtype, given, sizes, one, one, one)
    several, parts = p > 1, p * is_double
    for error, formula in (
        (mean, 2 * (k + 2) * u + r),
        (var, 12 * (k + 3) * u + 2 * r * several),
        (invstd, 6 * (k + 3) * u + r * several),
        (inferred / 2, 7 * u),
        (y / 3, (8 * k + 29) * u + r),
        (dgamma / m, (k + parts + (5 if is_double else 6)) * u),
        (dbeta / m, (k + parts + (not is_double)) * u),
        (dx / 3, (k + parts + (16 if is_double else 12)) * u),
    ):
        assert error <= 1.001 * formula + rest


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
def test_bounds_are_useful(dtype):
    """They promise digits: for a million values, three of float32 and twelve of float64."""
    sums = error_bounds.chain(np.dtype(dtype), 16, 64, 62_500)
    promised = 1e-12 if dtype == np.float64 else 1e-4
    assert error_bounds.mean_error(sums, dtype, 0.0, 1.0) < promised
    var = error_bounds.var_error(sums, dtype, np.zeros(1), np.ones(1))
    assert error_bounds.invstd_error(var, np.ones(1), EPS) < promised


def test_counts_hold_for_the_kernels_grid(rng):
    """The roundings that the bounds count are not fewer than the kernels' own grid has."""
    for _ in range(3000):
        rows, channels, run = (int(n) for n in 2.0 ** rng.uniform([0, 0, 0], [14, 9, 14]))
        if rng.random() < 0.3:
            run = 1
        columns = channels > 1 and (run == 1 or (run < 64 and rows >= 4))
        shape = (1, channels, rows * run) if channels == 1 else (rows, channels, run)
        plan = bncpu.cpu.kernels.tile_plan(columns, *shape)
        pieces, parts = plan["pieces"], plan["parts"]
        apart = plan["rows"] >= parts and not columns  # parts of whole rows
        most = -(-plan["rows"] // parts) * plan["segments"] if apart else -(-pieces // parts)
        for dtype, lanes in ((np.float32, 4), (np.float64, 2)):
            counted = error_bounds.chain(np.dtype(dtype), rows, channels, run)
            assert counted.parts >= parts, shape
            if columns:
                # Three within four rows, then four rows at a time and those that are left.
                piece = min(plan["piece_rows"], plan["rows"])
                narrow = 3 + max(piece // 4 - 1, 0) + piece % 4 if piece >= 4 else piece - 1
                columns_of_a_channel = (run // 8 + 7 if run > 1 else 0) + plan["fold"]
                wide = most - 1 + columns_of_a_channel
            else:
                even = -(-shape[2] // plan["segments"])
                segment = min(shape[2], -(-even // 64) * 64)  # whole vectors
                narrow = min(segment - 1, segment // (4 * lanes) + 4)
                wide = most - 1 + 4
            m = rows * run
            assert counted.narrow >= min(narrow, m - 1), (shape, counted, plan)
            assert counted.wide >= wide, (shape, counted, plan)


def test_exact_truth_is_exact():
    x = np.array([0.1, -0.7, 3e8, 5e-324, 1e-30])
    got = exact.moments(exact.whole(x), 0.0)
    values = [Fraction(v) for v in x.tolist()]
    assert got.mean == sum(values) / 5
    assert got.m2 == sum((v - got.mean) ** 2 for v in values)
    assert abs(got.invstd**2 * got.m2 / 5 - 1) < Fraction(1, 2**190)
    line = [Fraction(2, 3) * v + Fraction(1, 7) for v in values]
    errors = exact.errors_of_line(x, [exact.whole(x)], [Fraction(2, 3)], Fraction(1, 7))
    np.testing.assert_allclose(
        errors, [abs(float(v - t)) for v, t in zip(values, line, strict=True)], rtol=1e-15
    )


# ---- The table and the figure


@pytest.fixture
def script(benchmark_script):
    return benchmark_script("accuracy")


def test_table_and_figure(script, tmp_path, capsys):
    pytest.importorskip("torch", reason="PyTorch stands beside us in the table")
    script.main(["--quick", "--dtype", "float32", "--dtype", "bfloat16", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for name in adversarial.X:
        assert f"| {name} |" in printed
    assert "### bfloat16" in printed
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
