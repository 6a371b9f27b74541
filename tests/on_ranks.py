"""What must hold on the ranks of a communicator: run by test_distributed.py under mpiexec.

    mpiexec -n 3 python tests/on_ranks.py SEED [CHECK ...]

Each check is called on every rank with the same random numbers. All parts are brought together and
compared with the truth for the whole batch; whoever fails tells, and ends all.
"""

import os
import re
import sys
import time
import traceback
import zlib

import numpy as np
import pytest
from accuracy import (
    assert_backward,
    assert_moments,
    assert_running,
    assert_same_bits,
    assert_train,
)
from cases import FLOATS, HALVES, parameter_dtype
from mpi4py import MPI

import bncpu
from bncpu import distributed, nn

EPS = 1e-5


def cuts(rng, n, size):
    """Yield ways to cut n samples into as many parts, by the places of the cuts."""
    yield "even", [n * i // size for i in range(size + 1)]
    yield "uneven", [0, *sorted(rng.integers(0, n, size - 1)), n]
    yield "all on the last", [*[0] * size, n]
    yield "one on each but the first", [0, *range(n - size + 1, n + 1)]


def whole(comm, part):
    """Return the parts of all ranks, one after the other."""
    return np.concatenate(comm.allgather(np.ascontiguousarray(part)))


def same_on_all(comm, *arrays):
    """Assert that all ranks have the same bits."""
    here = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    assert len(set(comm.allgather(here))) == 1, "ranks differ"


def train_and_backward(comm, rng, shape, dtype, ends, axis, form, ratio=0.25):
    """Do both on parts of a batch, and compare all that comes out with the truth."""
    relu, with_residual, with_mask = form
    x = rng.normal(ratio, 1.0, shape)
    x = np.moveaxis(x * rng.uniform(0.5, 2.0, shape[1])[(...,) + (None,) * (x.ndim - 2)], 1, axis)
    x = np.ascontiguousarray(x).astype(dtype)
    dy = (rng.normal(0.3, 1.0, x.shape)).astype(dtype)
    gamma, beta = (rng.normal(1.0, 0.3, shape[1]).astype(parameter_dtype(dtype)) for _ in range(2))
    residual = rng.normal(0.0, 1.0, x.shape).astype(dtype) if with_residual else None
    own = slice(ends[comm.rank], ends[comm.rank + 1])
    x_own, dy_own = x[own], dy[own]
    fused = {"axis": axis, "eps": EPS, "activation": "relu" if relu else None, "comm": comm}
    if with_mask:
        fused["mask"] = np.empty((x_own.size + 7) // 8, np.uint8)
    running = np.zeros(shape[1]), np.ones(shape[1])
    y, moments = distributed.batch_norm_train(
        x_own,
        gamma,
        beta,
        running_mean=running[0],
        running_var=running[1],
        residual=None if residual is None else residual[own],
        **fused,
    )
    same_on_all(comm, moments.mean, moments.m2, *running)
    assert_moments(moments, x, axis=axis)
    assert_running(*running, x, axis=axis)
    invstd = 1 / np.sqrt(moments.var() + EPS)
    got = bncpu.TrainResult(whole(comm, y), moments.mean, invstd)
    options = {"eps": EPS, "axis": axis, "residual": residual, "activation": fused["activation"]}
    assert_train(got, x, gamma, beta, **options)

    kept = dy_own.copy()
    gradients = distributed.batch_norm_backward(
        dy_own, x_own, moments, gamma, beta, residual=with_residual, **fused
    )
    assert_same_bits(dy_own, kept, "dy")
    dresidual = None if gradients.dresidual is None else whole(comm, gradients.dresidual)
    assert (dresidual is not None) == with_residual
    sums = (np.sum(comm.allgather(a), 0, a.dtype) for a in (gradients.dgamma, gradients.dbeta))
    together = bncpu.Gradients(whole(comm, gradients.dx), *sums, dresidual)
    passes = np.asarray(got.y != 0) if relu else None
    assert_backward(together, dy, x, moments.mean, invstd, gamma, axis=axis, passes=passes)
    in_place = distributed.batch_norm_backward(
        kept, x_own, moments, gamma, beta, residual=with_residual, out=kept, **fused
    )
    assert in_place.dx is kept
    assert_same_bits(in_place.dx, gradients.dx, "in place")


FORMS = {
    "plain": (False, False, False),
    "relu": (True, False, False),
    "add": (False, True, False),
    "add, relu": (True, True, True),
}


def check_functions(comm, rng):
    for dtype in (*FLOATS, *HALVES):
        for way, ends in cuts(rng, 11, comm.size):
            if dtype in HALVES and way in ("even", "all on the last"):
                continue  # nothing that the wider ones have not shown
            for form in FORMS.values():
                train_and_backward(comm, rng, (11, 5, 7), dtype, ends, 1, form)
            train_and_backward(comm, rng, (11, 5), dtype, ends, -1, FORMS["relu"])
            train_and_backward(comm, rng, (11, 9, 2, 3), dtype, ends, -1, FORMS["add, relu"])


def check_large_means(comm, rng):
    for dtype in FLOATS:
        for _, ends in cuts(rng, 64, comm.size):
            shape, form = (64, 3, 11), FORMS["plain"]
            train_and_backward(comm, rng, shape, dtype, ends, 1, form, ratio=1e6)


def check_one_message_each(comm, rng):
    """Find messages of the promised sizes, and buffers in them, no pickles."""

    class Watched(MPI.Intracomm):
        def Allgather(self, sendbuf, recvbuf):  # noqa: N802
            sent.append(sendbuf)
            return super().Allgather(sendbuf, recvbuf)

        def allgather(self, _):
            raise AssertionError("a pickle")

    sent, watched = [], Watched(comm)
    x = rng.normal(size=(4 * comm.size, 6, 2)).astype(np.float32)[comm.rank * 4 :][:4]
    layer = distributed.SyncBatchNorm(6, comm=watched)
    layer.backward(layer(x))
    assert [(type(a), a.dtype, a.size) for a in sent] == [
        (np.ndarray, np.float64, 2 * 6 + 1),
        (np.ndarray, np.float64, 2 * 6),
    ]


def check_who_comes_first(comm, rng):
    """Let one rank after the other be late: the bits of the statistics stay the same."""
    x = rng.normal(size=(comm.size, 40, 3))[comm.rank]
    results = []
    for late in range(comm.size):
        if comm.rank == late:
            time.sleep(0.02)
        results.append(distributed.batch_norm_train(x, comm=comm).moments)
    for moments in results:
        assert_same_bits(moments.mean, results[0].mean)
        assert_same_bits(moments.m2, results[0].m2)


def check_special_values(comm, rng):
    """NaN and Inf stay in their channel; huge means on one rank do not overflow by empty ones."""
    x = rng.normal(size=(3 * comm.size, 4))
    x[0, 0], x[1, 1], x[:, 3] = np.nan, np.inf, 1e200
    own = x[: len(x) if comm.rank == 0 else 0]
    y, moments = distributed.batch_norm_train(own, comm=comm, eps=1e-5)
    assert np.isfinite(whole(comm, y)[:, 2]).all()
    assert not np.isfinite(moments.mean[:2]).any()
    assert (whole(comm, y)[:, 3] == 0).all()
    dx = distributed.batch_norm_backward(np.ones_like(own), own, moments, comm=comm).dx
    assert np.isfinite(dx[:, 2:]).all()


def check_nothing_and_one_value(comm, rng):
    """No value at all is no error, one altogether is one, on every rank."""
    running = np.zeros(3), np.ones(3)
    kept = {"running_mean": running[0], "running_var": running[1]}
    empty = np.empty((0, 3))
    y, moments = distributed.batch_norm_train(empty, comm=comm, **kept)
    assert (y.shape, moments.count) == ((0, 3), 0)
    gradients = distributed.batch_norm_backward(empty, empty, moments, comm=comm)
    assert gradients.dx.shape == (0, 3)
    assert not gradients.dgamma.any()
    one = rng.normal(size=(1 if comm.rank == comm.size - 1 else 0, 3))
    assert_raises(
        ValueError,
        "x: expected more than one value per channel to train on; got one on all ranks",
        lambda: distributed.batch_norm_train(one, comm=comm, **kept),
    )
    assert not running[0].any()
    assert (running[1] == 1).all()


def check_layer(comm, rng):
    """Compare a layer on parts with the plain layer on the whole batch, in state and results."""
    n, c = 5 * comm.size, 4
    plain = bncpu.BatchNorm(c, momentum=None, activation="relu", dtype=np.float64)
    layer = distributed.SyncBatchNorm(
        c, comm=comm, momentum=None, activation="relu", dtype=np.float64
    )
    for _, ends in cuts(rng, n, comm.size):
        own = slice(ends[comm.rank], ends[comm.rank + 1])
        x, residual, dy = rng.normal(2, 3, (3, n, c, 3))
        y = layer(x[own], residual=residual[own])
        np.testing.assert_allclose(y, plain(x, residual=residual)[own], rtol=0, atol=1e-13)
        dx = layer.backward(dy[own])
        np.testing.assert_allclose(dx, plain.backward(dy)[own], rtol=0, atol=1e-12)
        assert_same_bits(layer.dresidual, plain.dresidual[own])
        for share, all_of_it in ((layer.dgamma, plain.dgamma), (layer.dbeta, plain.dbeta)):
            np.testing.assert_allclose(comm.allreduce(share), all_of_it, rtol=0, atol=1e-11)
    state, expected = layer.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert state["num_batches_tracked"] == expected["num_batches_tracked"] == 4
    for name, array in state.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-13, atol=0)
        same_on_all(comm, array)
    layer.eval()
    plain.load_state_dict(layer.state_dict())
    plain.eval()
    assert_same_bits(layer(x), plain(x))  # no communication: ranks may come alone
    assert_same_bits(layer.backward(dy), plain.backward(dy))


def check_moments(comm, rng):
    x = rng.normal(1e6, 1.0, (37, 5))
    for _, ends in cuts(rng, 37, comm.size):
        local = bncpu.batch_moments(x[ends[comm.rank] : ends[comm.rank + 1]])
        moments = distributed.merge_moments(local, comm=comm)
        assert_moments(moments, x)
        same_on_all(comm, moments.mean, moments.m2)


def compare_training(comm, rng, steps):
    """Compare the loss curve with that of one process, and return how to train, and that curve."""
    n = 83
    x, y = rng.normal(size=(n, 12)), rng.integers(0, 5, n)
    x += np.eye(12)[y] * 2

    def run(x, y, comm):
        model = nn.fully_connected(
            [12, 16, 16, 5],
            activation=nn.Tanh,
            rng=np.random.default_rng(3),
            dtype=np.float64,
            comm=comm,
        )
        if comm and comm.rank:  # rank 0's state is everybody's
            model.layers[0].weight += 1
        optimizer = nn.SGD(0.1, 0.9)
        options = {"steps": steps, "batch_size": 21, "seed": 5, "every": 1, "test": (x, y)}
        records = nn.fit(model, optimizer, x, y, comm=comm, **options)
        return records, model.state_dict() | optimizer.state_dict()

    alone, expected = run(x, y, None)
    for _, ends in cuts(rng, n, comm.size):
        own = slice(ends[comm.rank], ends[comm.rank + 1])
        records, state = run(x[own], y[own], comm)
        for record, of_one in zip(records, alone, strict=True):
            assert record.step == of_one.step
            assert record.accuracy == of_one.accuracy
            assert record.loss is None or abs(record.loss - of_one.loss) < 1e-10
        for name, array in state.items():
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-10)
            same_on_all(comm, array)
    return run, x, y, alone


def check_training(comm, rng):
    run, x, y, curve = compare_training(comm, rng, 40)
    assert curve[-1].loss < curve[1].loss  # it has learnt something
    assert_raises(
        ValueError,
        "x: expected at least one example on one of the ranks; got none",
        lambda: run(x[:0], y[:0], comm),
    )
    assert_raises(
        FloatingPointError,
        "the training diverged",
        lambda: run(x[comm.rank :: comm.size] * np.nan, y[comm.rank :: comm.size], comm),
    )


def check_disagreement(comm, rng):
    """With BNCPU_DEBUG=1 every rank refuses a call that is not the same on all."""
    rank = comm.rank
    last = rank == comm.size - 1
    x = rng.normal(size=(4, 3, 2))
    one, other = (distributed.SyncBatchNorm(3, comm=comm, dtype=np.float64) for _ in range(2))
    moments = bncpu.batch_moments(x)

    def train(x=x, **options):
        return lambda: distributed.batch_norm_train(x, comm=comm, **options)

    cases = {
        "C=(2,)": train(x[:, :2]),
        "dtype=float32": train(x.astype(np.float32)),
        "eps=0.001": train(eps=1e-3),
        "momentum=0.5": train(momentum=0.5),
        "activation=relu": train(activation="relu"),
        "batch_norm_backward": lambda: distributed.batch_norm_backward(x, x, moments, comm=comm),
        "merge_moments": lambda: distributed.merge_moments(moments, comm=comm),
        "add_up": lambda: nn.parallel.Ranks.add_up(ranks, {"weight": x}),
    }
    ranks = nn.parallel.Ranks(comm, 4)
    os.environ["BNCPU_DEBUG"] = "1"
    try:
        for differs, call in cases.items():
            if comm.size == 1:
                call()
                continue
            called = call if last else train()
            assert_raises(ValueError, f"rank {comm.size - 1}: ", called, differs)
        if comm.size > 1:
            order = (one, other) if last else (other, one)
            assert_raises(ValueError, "expected the same call on every rank", lambda: order[0](x))
        assert len(one(x)) == 4  # and what is the same passes
        compare_training(comm, rng, 3)
    finally:
        del os.environ["BNCPU_DEBUG"]


def assert_raises(kind, start, call, *contained):
    with pytest.raises(kind, match=re.escape(start)) as caught:
        call()
    for text in contained:
        assert text in str(caught.value)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


def main(seed, *names):
    comm = MPI.COMM_WORLD
    for name in names or CHECKS:
        try:
            CHECKS[name](comm, np.random.default_rng([int(seed), zlib.crc32(name.encode())]))
        except BaseException:
            print(f"{name} on rank {comm.rank} of {comm.size}", file=sys.stderr)
            traceback.print_exc()
            sys.stderr.flush()
            comm.Abort(1)
        if comm.rank == 0:
            print("held:", name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
