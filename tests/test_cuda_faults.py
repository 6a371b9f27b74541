"""Faults planted in the CUDA kernels are found: what the other tests show depends on it.

A fault is one change of the source. With it, the checks of a small battery must fail; without it,
they must pass.
"""

from typing import NamedTuple

import cuda_calls
import cuda_emulator
import numpy as np
import pytest
from accuracy import assert_running
from cases import normal
from cuda_calls import DEVICES, Call, far_apart
from forms import EVERYTHING, RELU, assert_same_results, check, problem

from bncpu.cuda import plan as planning

ONE_CHANNEL = (9, 5, 80)  # a tile is a channel, in several parts
CHANNELS = (130, 72)  # a tile is several channels side by side
BYTES_ALONE = (5, 3, 68)  # no byte of the mask is a row's own


class Fault(NamedTuple):
    """A piece of the source, what it becomes, and the shape at which that shows."""

    before: str
    after: str
    shape: tuple[int, ...] = ONE_CHANNEL


FAULTS = {
    "a barrier dropped between the steps of a merge": Fault(
        "half /= 2) {\n        __syncthreads();", "half /= 2) {"
    ),
    "a barrier dropped behind the table": Fault(
        "        }\n    }\n    __syncthreads();\n}\n\n// The channel of lane",
        "        }\n    }\n}\n\n// The channel of lane",
        CHANNELS,
    ),
    "a barrier dropped before the next part": Fault(
        "    __syncthreads();  // they may go\n", "", CHANNELS
    ),
    "a barrier that some threads leave out": Fault(
        "    __syncthreads();  // they may go\n",
        "    if (threadIdx.x > 0) __syncthreads();  // they may go\n",
    ),
    "a biased running variance": Fault("(var * (m / (m - 1)))", "var"),
    "a vector too many in a row": Fault("v < end_v;", "v <= end_v;"),
    "a row too many": Fault("return k < end_k", "return k <= end_k"),
    "a vector too few in a row": Fault("v < end_v;", "v + 1 < end_v;", CHANNELS),
    "bits of a lane in another's place": Fault("<< V * lanes", "<< (V - 1) * lanes"),
    "a mask read off by a bit": Fault(
        "unsigned bits = byte[0] >> shift;", "unsigned bits = byte[0] >> (shift ^ 1);"
    ),
    "a mask packed off by a bit": Fault("!= 0) << i;", "!= 0) << (i ^ 1);", BYTES_ALONE),
    "deviations from the mean before": Fault(
        "fused(d, about - mean[i], m2[i])", "fused(d, d, m2[i])"
    ),
    "no pivot": Fault("pivot[i] = value.value[i];", "pivot[i] = 0;", CHANNELS),
    "a mean of one float": Fault("d : d - at(low, i)", "d : d"),
    "a sign from another formula": Fault(
        "passes(k.normalised(widen(x.value[i]), i))", "passes(k.xhat(widen(x.value[i]), i))"
    ),
    "one stash for all threads": Fault("step * blockDim.x + threadIdx.x", "step * blockDim.x"),
    "two stashes in one place": Fault(
        "{words + Walk::steps(p, part) * blockDim.x}",
        "{words + (Walk::steps(p, part) - 1) * blockDim.x}",
    ),
    "shared memory used past its end": Fault("kFields + 3) / 4 * 4)", "kFields + 3) / 4 * 4 + 64)"),
    "an address off by an element": Fault("(k * row + c * channel)", "(k * row + c * channel + 1)"),
}


def battery(shape, load, in_order=lambda launches: launches):
    """Compute everything on both devices in several orders of threads, and check it."""
    rng = np.random.default_rng(20150211)
    dtype = np.dtype(np.float32)
    near = problem(rng, shape, dtype)
    far = near._replace(x=normal(rng, shape, dtype, mean=1e5, std=1.0), mean=near.mean + 1e5)
    for device in DEVICES.values():
        for form, p in ((EVERYTHING, near), (RELU, far)):
            expected = None
            for seed in range(3):
                call = Call(device, seed, load, in_order=in_order)
                got = cuda_calls.run(form, p, call)
                check(form, p, got)
                assert_running(got["running_mean"], got["running_var"], p.x)
                expected = expected or got
                assert_same_results(got, expected, f"schedule {seed}")


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """Let blocks take several parts, one after the other."""
    planning.plan.cache_clear()
    monkeypatch.setattr(planning, "GRID_LIMIT", 2)
    yield
    planning.plan.cache_clear()


@pytest.mark.parametrize("shape", [ONE_CHANNEL, CHANNELS, BYTES_ALONE], ids=str)
def test_without_a_fault_the_battery_passes(shape):
    battery(shape, cuda_emulator.load)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(tmp_path, fault):
    source = cuda_emulator.KERNELS.read_text()
    assert source.count(fault.before) == 1, "the piece of source is there, once"
    planted = tmp_path / "kernels.cu"
    planted.write_text(source.replace(fault.before, fault.after))
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        battery(fault.shape, lambda options: cuda_emulator.load(options, planted))
    assert "does not compile" not in str(caught.value)


def test_an_offset_of_32_bits_is_found(tmp_path):
    source = cuda_emulator.KERNELS.read_text()
    planted = tmp_path / "kernels.cu"
    before = "data + (k * row"
    assert source.count(before) == 1
    planted.write_text(source.replace(before, "data + (int)(k * row"))
    p = problem(np.random.default_rng(0), (2, 3, 40), np.dtype(np.float16))
    cuda_calls.run(EVERYTHING, p, Call(layout=far_apart))
    call = Call(load=lambda options: cuda_emulator.load(options, planted), layout=far_apart)
    with pytest.raises(RuntimeError, match="touched"):
        cuda_calls.run(EVERYTHING, p, call)


@pytest.mark.parametrize("shape", [(9, 1, 4096), (3000, 16)], ids=str)
def test_launches_in_another_order_are_found(shape):
    battery(shape, cuda_emulator.load)
    with pytest.raises((AssertionError, RuntimeError)):
        battery(shape, cuda_emulator.load, in_order=lambda launches: launches[::-1])
