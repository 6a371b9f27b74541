"""ReLU and a residual fused with batch normalisation, on every level.

Against the equations in float64; against the parts, done one after the other, to the bit; and what
is written where: masks, gradients of residuals, results in the memory of an input.
"""

import numpy as np
import pytest
from accuracy import assert_infer, assert_relu_of, assert_same_bits, assert_train
from cases import FLOATS, HALVES, Output, lay, memory_order, new_mask, normal, of_size
from forms import EVERYTHING, FORMS, FUSED, PLAIN, RELU, problem, run, run_and_check

import bncpu

pytestmark = pytest.mark.usefixtures("level")

# (N, C, S) whose rows begin within a byte of the mask (S = 1, 3, 7, 49, 2049 and an odd C), and
# some that do not; the last have channels larger than a piece.
SIZES = [
    *((2, 1, 1), (129, 5, 1), (3, 1000, 1), (2, 3, 3), (300, 5, 3), (1, 3, 7), (9, 5, 7)),
    *((2, 3, 8), (3, 7, 15), (5, 64, 16), (2, 5, 31), (129, 1, 49), (7, 33, 49), (4, 3, 513)),
    *((3, 5, 2049), (1, 2, 4096), (1, 1, 65_537)),
]
ROWS_OF_CHANNELS = [(2, 1), (501, 1), (3, 3), (129, 7), (33, 15), (31, 33), (130, 49), (17, 1025)]
IN_PLACE = [
    *(((5, 3, 6, 9), layout) for layout in ("c", "channels_last", "cropped", "reversed_strided")),
    *(((19, 8), "c"), ((19, 8), "inner_strided"), ((2, 3, 2049), "c"), ((2, 3, 2049), "reversed")),
]
DENSE = ["c", "fortran", "channels_last", "channels_first", "samples_innermost", "off_by_an_item"]


@pytest.fixture(params=[*FLOATS, *HALVES], ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(rng, dtype, size):
    p = problem(rng, of_size(size), dtype)
    for form in FUSED.values():
        run_and_check(form, p)


@pytest.mark.parametrize("size", ROWS_OF_CHANNELS, ids=str)
def test_channels_innermost(rng, dtype, size):
    p = problem(rng, size, dtype, -1)
    for form in FUSED.values():
        run_and_check(form, p)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((6, 4), 0),
        ((2, 3, 2, 5, 3), 1),
        ((3, 4, 2, 6), -2),
        ((5, 3, 4, 2), (1, 2, 3)),
        ((5, 3, 4, 2), (0, -1)),
        ((129, 2, 33), (2, 1)),
    ],
)
def test_any_rank_and_axis(rng, dtype, shape, axis):
    p = problem(rng, shape, dtype, axis)
    for form in FUSED.values():
        run_and_check(form, p)


@pytest.mark.parametrize("size", [(3, 5, 7), (129, 7, 1), (2, 3, 2049)], ids=str)
@pytest.mark.parametrize("absent", ["gamma", "beta", "both"])
def test_absent_parameters(rng, dtype, size, absent):
    p = problem(rng, of_size(size), dtype)
    p = p._replace(**{name: None for name in ("gamma", "beta") if absent in (name, "both")})
    ones, zeros = np.ones(p.mean.shape), np.zeros(p.mean.shape)
    kind = problem(rng, (2, 1), dtype).gamma.dtype
    spelled_out = p._replace(
        gamma=ones.astype(kind) if p.gamma is None else p.gamma,
        beta=zeros.astype(kind) if p.beta is None else p.beta,
    )
    for form in (RELU, EVERYTHING):
        got = run_and_check(form, p)
        for name, a in run(form, spelled_out).items():
            if a is not None:
                np.testing.assert_array_equal(got[name], a, name)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_y_is_relu_of_y_without(rng, dtype, size):
    """To the bit: ReLU is fused, and nothing else is changed by it."""
    p = problem(rng, of_size(size), dtype)
    for form in (RELU, FORMS["residual, relu"], EVERYTHING):
        fused, apart = run(form, p), run(form._replace(relu=False, mask=False), p)
        for name in ("train y", "infer y"):
            assert_relu_of(fused[name], apart[name])
        for name in ("train mean", "train invstd", "running_mean", "running_var"):
            assert_same_bits(fused[name], apart[name], name)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_backward_with_a_mask_is_backward_without(rng, dtype, size):
    """To the bit: the sign that is computed again is the forward's."""
    p = problem(rng, of_size(size), dtype)
    with_mask, without = run(FORMS["relu with mask"], p), run(RELU, p)
    for name, a in without.items():
        if a is not None:
            assert_same_bits(with_mask[name], a, name)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_backward_is_the_plain_one_of_what_passes(rng, dtype, size):
    """To the bit, and a residual that is asked for changes no other gradient."""
    p = problem(rng, of_size(size), dtype)
    got = run(EVERYTHING, p)
    zero = np.zeros((), dtype)
    expected = bncpu.batch_norm_backward(
        np.where(got["train y"] != 0, p.dy, zero), p.x, got["train mean"], got["train invstd"],
        p.gamma,
    )  # fmt: skip
    for name in ("dx", "dgamma", "dbeta"):
        assert_same_bits(got[f"train {name}"], getattr(expected, name), name)
    expected = bncpu.batch_norm_infer_backward(
        np.where(got["infer y"] != 0, p.dy, zero), p.x, p.mean, p.var, p.gamma
    )
    for name in ("dx", "dgamma", "dbeta"):
        assert_same_bits(got[f"infer {name}"], getattr(expected, name), name)


@pytest.mark.parametrize("shape", [(5, 3, 7), (3, 5, 6, 9), (9, 7), (2, 3, 3, 683)], ids=str)
@pytest.mark.parametrize("layout", DENSE)
def test_masks_are_in_memory_order(rng, dtype, layout, shape):
    """Where x lies in memory without gaps, in whatever order, so do the bits."""
    p = problem(rng, shape, dtype, layout=layout)
    for name in ("relu with mask", "residual, relu with mask"):
        got = run(FORMS[name], p)
        for which in ("train", "infer"):
            passes = np.transpose(got[f"{which} y"] != 0, memory_order(p.x))
            expected = np.packbits(passes.reshape(-1), bitorder="little")
            assert_same_bits(got[f"{which} mask"], expected, f"{which} mask")


@pytest.mark.parametrize("form", ["relu with mask", "residual, relu with mask"])
def test_a_mask_is_all_that_backward_reads_of_the_sign(rng, dtype, form):
    """Bits of anybody's choosing let through what they say, whatever x and beta say."""
    p = problem(rng, (5, 3, 7), dtype)
    mask = rng.integers(0, 256, (p.x.size + 7) // 8, dtype=np.uint8)
    mask[-1] &= 2 ** (p.x.size % 8) - 1
    passes = np.unpackbits(mask, count=p.x.size, bitorder="little").reshape(p.x.shape)
    residual = FORMS[form].residual
    dz = np.where(passes, p.dy, np.zeros((), dtype))
    for function in (bncpu.batch_norm_backward, bncpu.batch_norm_infer_backward):
        plain = function(dz, p.x, p.mean, p.var, p.gamma)
        before = mask.copy()
        got = function(
            p.dy, p.x, p.mean, p.var, p.gamma, p.beta, activation="relu", mask=mask,
            residual=residual,
        )  # fmt: skip
        for name in ("dx", "dgamma", "dbeta"):
            assert_same_bits(getattr(got, name), getattr(plain, name), name)
        assert_same_bits(mask, before, "mask")
        if residual:
            assert_same_bits(got.dresidual, dz, "dresidual")


def test_everything_passes_or_nothing(rng, dtype):
    p = problem(rng, (5, 3, 7), dtype)
    for beta, passes in [(100.0, True), (-100.0, False)]:
        q = p._replace(beta=np.full_like(p.beta, beta))
        got = run_and_check(RELU, q)
        plain = run(PLAIN, q._replace(dy=q.dy if passes else np.zeros_like(q.dy)))
        for name in ("infer dx", "infer dgamma", "infer dbeta", "train dx", "train dgamma"):
            np.testing.assert_array_equal(got[name], plain[name], name)


@pytest.mark.parametrize(("shape", "layout"), IN_PLACE, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_results_in_the_memory_of_an_input(rng, dtype, form, shape, layout):
    form = FORMS[form]
    p = problem(rng, shape, dtype, layout=layout)
    expected = run(form, p)
    inputs = (p.gamma, p.beta)
    names = ["x", "residual"] if form.residual else ["x"]
    for name in names:
        output = Output(layout, shape, dtype)
        output.array[...] = getattr(p, name)
        q = p._replace(**{name: output.array})
        how = {"activation": form.activation, "out": output.array}
        how |= {"residual": q.residual} if form.residual else {}
        mask = new_mask(p.x) if form.mask else None
        y = bncpu.batch_norm_infer(q.x, p.mean, p.var, *inputs, mask=mask, **how)
        assert y is output.array
        assert_same_bits(y, expected["infer y"], f"y in {name}")
        if form.mask:
            assert_same_bits(mask, expected["infer mask"], "mask")
        output.assert_only_inside()
        if name == "residual":
            output.array[...] = p.residual
            y = bncpu.batch_norm_train(q.x, *inputs, mask=mask, **how).y
            assert y is output.array
            assert_same_bits(y, expected["train y"], f"y in {name}")
            if form.mask:
                assert_same_bits(mask, expected["train mask"], "mask")
            output.assert_only_inside()


@pytest.mark.parametrize(("shape", "layout"), IN_PLACE, ids=str)
@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.has_backward])
def test_gradients_in_the_memory_of_dy(rng, dtype, form, shape, layout):
    form = FORMS[form]
    p = problem(rng, shape, dtype, layout=layout)
    expected = run(form, p)
    batch = expected["train mean"], expected["train invstd"]
    for which, function, statistics in [
        ("train", bncpu.batch_norm_backward, batch),
        ("infer", bncpu.batch_norm_infer_backward, (p.mean, p.var)),
    ]:
        for place in ["dx", "dresidual"] if form.residual else ["dx"]:
            output = Output(layout, shape, dtype)
            output.array[...] = p.dy
            how = {"out": output.array} if place == "dx" else {"residual": output.array}
            got = function(
                *(output.array, p.x, *statistics, p.gamma, p.beta),
                **({"residual": form.residual, "activation": form.activation} | how),
                mask=expected[f"{which} mask"],
            )
            assert getattr(got, place) is output.array
            output.assert_only_inside()
            for name, a in got._asdict().items():
                if a is not None:
                    assert_same_bits(a, expected[f"{which} {name}"], f"{which} {name}")
            if form.residual:
                assert not np.shares_memory(got.dx, got.dresidual)


def test_dresidual(rng, dtype):
    """None unless asked for; without an activation dy itself, or where it was asked for."""
    p = problem(rng, (5, 3, 7), dtype)
    for function in (bncpu.batch_norm_backward, bncpu.batch_norm_infer_backward):
        arrays = p.dy, p.x, p.mean, p.var, p.gamma, p.beta
        assert function(*arrays).dresidual is None
        assert function(*arrays, activation="relu").dresidual is None
        assert function(*arrays, residual=True).dresidual is p.dy
        assert function(*arrays, residual=p.dy).dresidual is p.dy
        own = np.empty_like(p.dy)
        got = function(*arrays, residual=own)
        assert got.dresidual is own
        assert_same_bits(own, p.dy, "dresidual")
        result = function(*arrays)
        assert len(result) == 4
        assert result._fields == ("dx", "dgamma", "dbeta", "dresidual")


@pytest.mark.parametrize("layout", ["c", "channels_last", "cropped", "misaligned", "reversed"])
def test_inputs_are_left_alone(rng, dtype, layout):
    p = problem(rng, (5, 3, 6, 9), dtype, layout=layout)
    arrays = [a for a in p if isinstance(a, np.ndarray)]
    copies = [a.copy() for a in arrays]
    for a in arrays:
        a.flags.writeable = False
    for form in FORMS.values():
        run(form, p)
    for a, b in zip(arrays, copies, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (4, 0), (0, 3, 0, 2)])
def test_empty(dtype, shape):
    channels = shape[1]
    x, mask = np.empty(shape, dtype), np.empty(0, np.uint8)
    mean, var = np.zeros(channels), np.ones(channels)
    fused = {"residual": x.copy(), "activation": "relu", "mask": mask}
    for y in (bncpu.batch_norm_train(x, **fused).y, bncpu.batch_norm_infer(x, mean, var, **fused)):
        assert y.shape == shape
        assert y.dtype == dtype
    for function in (bncpu.batch_norm_backward, bncpu.batch_norm_infer_backward):
        got = function(x, x.copy(), mean, var, activation="relu", mask=mask, residual=True)
        assert got.dx.shape == got.dresidual.shape == shape
        assert got.dx.dtype == got.dresidual.dtype == dtype
        assert not got.dgamma.any()
        assert not got.dbeta.any()


@pytest.mark.parametrize("ratio", [1e3, 1e6])
def test_large_mean(rng, dtype, ratio):
    """Signs behind ReLU are those of x - mean, which a folded shift would lose."""
    shape = (8, 3, 513)
    ratio = min(ratio, 3e4) if dtype == np.float16 else ratio  # which ends at 65504
    x = normal(rng, shape, dtype, mean=ratio, std=1.0)
    residual, mask = normal(rng, shape, dtype), new_mask(x)
    fused = {"residual": residual, "activation": "relu", "mask": mask}
    assert_train(bncpu.batch_norm_train(x, **fused), x, **fused)
    mean, var = np.full(3, ratio) + rng.random(3), np.ones(3)
    assert_infer(bncpu.batch_norm_infer(x, mean, var, **fused), x, mean, var, **fused)


def test_a_residual_of_another_layout(rng, dtype):
    """Arrays whose strides do not fit x's walk are copied; the mask stays in x's order."""
    p = problem(rng, (5, 3, 6, 9), dtype)
    expected = run(EVERYTHING, p)
    for layout in ("channels_last", "reversed", "inner_strided", "misaligned"):
        q = p._replace(residual=lay(layout, p.residual), dy=lay(layout, p.dy))
        got = run(EVERYTHING, q)
        for name, a in expected.items():
            assert_same_bits(got[name], a, f"{name} with a residual {layout}")


@pytest.mark.parametrize("dtype", [*FLOATS, HALVES[1]], ids=str)  # float16 holds no such values
@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 2, 2048), 1), ((64, 5, 7), 1), ((64, 5, 7), -1), ((300, 5), 1)]
)
def test_huge_gradients(rng, dtype, shape, axis):
    """Sums that float32 cannot hold are formed again in float64, of what passes and no more."""
    p = problem(rng, shape, dtype, axis)
    p = p._replace(dy=(1e37 * (1.0 + rng.standard_normal(shape))).astype(dtype))
    for form in (RELU, EVERYTHING):
        run_and_check(form, p)
