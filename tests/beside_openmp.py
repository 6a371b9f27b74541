"""A program that computes beside another library that uses OpenMP, and prints bncpu's bits.

    python tests/beside_openmp.py none|torch|sklearn first|last

The other library is imported before bncpu or after it. Prints a JSON object: the files of the
OpenMP runtimes in the process, get_num_threads() as it is and within limits of threadpoolctl, and a
digest of all results, computed after regions of the other library, and at the same time as these.
"""

import hashlib
import importlib
import json
import sys
import threading

import numpy as np
import threadpoolctl

name, order = sys.argv[1:]
if order == "first" and name != "none":
    importlib.import_module(name)

import bncpu  # noqa: E402


def region_of(name):
    """Return a function that runs a parallel region of another library."""
    if name == "torch":
        import torch

        a, b = torch.ones(1 << 20), torch.empty(1 << 20)
        return lambda: torch.add(a, 1, out=b)
    if name == "sklearn":
        from sklearn.metrics import pairwise_distances_argmin

        points = np.random.default_rng(1).random((8192, 4))
        return lambda: pairwise_distances_argmin(points, points[:8])
    return lambda: None


def digest_of(x, dy, region):
    digest = hashlib.sha256()
    for threads in (None, 2, 3):
        region()
        y, mean, invstd = bncpu.batch_norm_train(x, activation="relu", num_threads=threads)
        region()
        gradients = bncpu.batch_norm_backward(
            dy, x, mean, invstd, activation="relu", num_threads=threads
        )
        for array in (y, mean, invstd, gradients.dx, gradients.dgamma, gradients.dbeta):
            digest.update(array.tobytes())
    return digest.hexdigest()


def main():
    region = region_of(name)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((8, 64, 28, 28), np.float32) for _ in range(2))
    digests = [digest_of(x, dy, region)]

    stop = threading.Event()

    def regions():
        while not stop.is_set():
            region()

    other = threading.Thread(target=regions)
    other.start()
    digests.append(digest_of(x, dy, lambda: None))
    stop.set()
    other.join()

    pools = threadpoolctl.threadpool_info()
    threads = {"default": bncpu.get_num_threads()}
    for limit in (1, 3):
        with threadpoolctl.threadpool_limits(limit, user_api="openmp"):
            threads[limit] = bncpu.get_num_threads()
    print(
        json.dumps(
            {
                "runtimes": sorted(p["filepath"] for p in pools if p["user_api"] == "openmp"),
                "threads": threads,
                "digests": digests,
            }
        )
    )


main()
