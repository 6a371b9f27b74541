"""How far results are from float64: bncpu and PyTorch beside each other, for growing |mean| / std.

Run it: ``python benchmarks/accuracy.py``. The truth is bncpu.reference on the same float32 input,
so what the input has lost to rounding counts for nobody. Not a test: tests/ has the tolerance.
"""

import importlib.util

import numpy as np

import bncpu
from bncpu import reference

SHAPE = (32, 64, 28, 28)
RATIOS = (1.0, 1e3, 1e6)


def errors(ratio, rng, torch):
    """Return the largest error of y and of dx, in units of their largest value, by contender."""
    x = (rng.standard_normal(SHAPE) + ratio).astype(np.float32)
    dy = rng.standard_normal(SHAPE).astype(np.float32)
    truth = reference.batch_norm_train(x)
    dx = reference.batch_norm_backward(dy, x, truth.mean, truth.invstd).dx
    y, mean, invstd = bncpu.batch_norm_train(x)
    results = {"bncpu": (y, bncpu.batch_norm_backward(dy, x, mean, invstd).dx)}
    if torch is not None:
        leaf = torch.from_numpy(x).requires_grad_()
        out = torch.nn.functional.batch_norm(leaf, None, None, training=True)
        out.backward(torch.from_numpy(dy))
        results["torch"] = (out.detach().numpy(), leaf.grad.numpy())
    return {
        name: (
            np.abs(y - truth.y).max() / np.abs(truth.y).max(),
            np.abs(g - dx).max() / abs(dx).max(),
        )
        for name, (y, g) in results.items()
    }


if __name__ == "__main__":
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    rng = np.random.default_rng()
    print(f"largest error of float32 {SHAPE} against float64, relative to the largest value")
    print(f"{'mean / std':>10}  {'contender':<9}  {'y':>8}  {'dx':>8}")
    for ratio in RATIOS:
        for name, (y, dx) in errors(ratio, rng, torch).items():
            print(f"{ratio:10.0e}  {name:<9}  {y:8.1e}  {dx:8.1e}")
