"""A training step of the Inception network of bncpu.nn against the same network in PyTorch.

    python benchmarks/trainer.py                 # batch 32 of 32 x 32 images, float32, all cores
    python benchmarks/trainer.py --threads 1 --rounds 3
    python benchmarks/trainer.py --quick --json trainer.json

A step is forward, loss, backward and SGD with momentum. Both start from the same weights and see
the same images. Each takes its turns in a process of its own, because threads of one runtime keep
the cores from those of another while they wait. Times are medians of a turn's steps; the ratio is
the median over the rounds. A table tells in which layers bncpu's step spends its time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict

import numpy as np

import bncpu
from bncpu import nn
from bncpu.cli.numbers import positive
from bncpu.nn.base import layers_of

NETWORKS = {"with BN": {}, "without BN, with LRN": {"batch_norm": False, "lrn": True}}
RATE, MOMENTUM = 0.01, 0.9
WARM_UP = 5  # steps; the first ones allocate


def problem(network, batch, dtype=np.float32):
    """Return a network, images and labels, the same at every call."""
    rng = np.random.default_rng(0)
    model = nn.inception(rng=rng, dtype=dtype, **NETWORKS[network])
    x = rng.standard_normal((batch, 3, 32, 32)).astype(dtype)
    return model, x, rng.integers(0, 10, batch)


def multiplications(model, image):
    """Return how many multiplications with weights an image takes."""
    layers = [each for each in layers_of(model) if isinstance(each, nn.Conv2d | nn.Linear)]
    with nn.recording(model, *layers) as inputs:
        model.forward(image)
    total = 0
    for layer, x in zip(layers, inputs[0], strict=True):
        pixels = np.prod(layer.windows.over(x.shape)) if isinstance(layer, nn.Conv2d) else 1
        total += int(layer.weight.size * pixels)
    return total


def in_pytorch(layer):
    """Return PyTorch's module of the same function, with the same parameters."""
    import torch

    kind = type(layer).__name__
    if kind == "Sequential":
        return torch.nn.Sequential(*map(in_pytorch, layer.layers))
    if kind == "Concat":

        class Concat(torch.nn.ModuleList):
            def forward(self, x):
                return torch.cat([branch(x) for branch in self], dim=1)

        return Concat(map(in_pytorch, layer.layers))
    if kind in ("ReLU", "Sigmoid"):
        return getattr(torch.nn, kind)()
    if kind == "LocalResponseNorm":
        return torch.nn.LocalResponseNorm(layer.size, layer.alpha, layer.beta, layer.k)
    if kind in ("MaxPool2d", "AvgPool2d"):
        windows = layer.windows
        return getattr(torch.nn, kind)(windows.kernel, windows.stride, windows.padding)
    if kind == "GlobalAvgPool":
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    state = {name: torch.from_numpy(np.array(v)) for name, v in layer.state_dict().items()}
    how = {"dtype": state["weight"].dtype}
    if kind == "BatchNorm":
        module = torch.nn.BatchNorm2d(*layer.shape, **how)
    elif kind == "Linear":
        module = torch.nn.Linear(layer.in_features, layer.out_features, **how)
    else:
        windows = layer.windows
        sizes = (layer.in_channels, layer.out_channels, windows.kernel, windows.stride)
        bias = layer.bias is not None
        module = torch.nn.Conv2d(*sizes, windows.padding, bias=bias, **how)
    module.load_state_dict(state)
    if kind == "BatchNorm" and layer.activation:
        return torch.nn.Sequential(module, torch.nn.ReLU())
    return module


def turn(peer, network, batch, steps, threads):
    """Return the times of a turn's steps, in seconds, and for bncpu those of its layers."""
    model, x, y = problem(network, batch)
    if peer == "PyTorch":
        import torch

        torch.set_num_threads(threads)
        module, x, y = in_pytorch(model), torch.from_numpy(x), torch.from_numpy(y)
        optimizer = torch.optim.SGD(module.parameters(), RATE, MOMENTUM)

        def step():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()

        return timed(step, steps), {}
    bncpu.set_num_threads(threads)
    optimizer = nn.SGD(RATE, MOMENTUM)
    times = []

    # fit's own loop, looked at from outside: it tells its progress after every step.
    class Clock:
        def update(self, n=1):  # noqa: ARG002
            times.append(time.perf_counter())

    length = {"batch_size": batch, "every": 10**9, "progress": Clock()}
    nn.fit(model, optimizer, x, y, steps=WARM_UP + steps, **length)
    with layer_times(model) as spent:
        nn.fit(model, optimizer, x, y, steps=steps, **length)
    return np.diff(times[WARM_UP - 1 : WARM_UP + steps]).tolist(), {
        name: seconds / steps for name, seconds in spent.items()
    }


def timed(step, steps):
    """Return how long each of some steps took, after those that warm up."""
    times = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times[WARM_UP:]


class layer_times:  # noqa: N801  used as a function
    """While inside, add up by kind the seconds that layers take for themselves."""

    def __init__(self, model):
        self.layers, self.spent, self.inside = layers_of(model), defaultdict(float), [0.0]

    def __enter__(self):
        for layer in self.layers:
            for name in ("forward", "backward"):
                setattr(layer, name, self.clocked(type(layer).__name__, getattr(layer, name)))
        return self.spent

    def __exit__(self, *_):
        for layer in self.layers:
            del layer.forward, layer.backward

    def clocked(self, kind, function):
        def call(*args, **how):
            self.inside.append(0.0)
            start = time.perf_counter()
            result = function(*args, **how)
            seconds = time.perf_counter() - start
            self.spent[f"{kind}, {function.__name__}"] += seconds - self.inside.pop()
            self.inside[-1] += seconds
            return result

        return call


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = bncpu.get_num_threads()
    parser.add_argument("--threads", type=positive, default=cores, help=f"default: {cores}")
    parser.add_argument("--batch", type=positive, default=32, help="images in a step (default: 32)")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each (default: 5)")
    parser.add_argument("--steps", type=positive, default=30, help="in a turn (default: 30)")
    parser.add_argument("--quick", action="store_true", help="one round of three steps")
    parser.add_argument("--json", metavar="FILE", help="write what was measured")
    parser.add_argument("--turn", nargs=2, metavar=("PEER", "NETWORK"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.steps = 1, 3
    if args.turn:
        print(json.dumps(turn(*args.turn, args.batch, args.steps, args.threads)))
        return
    results = {}
    for network in NETWORKS:
        rounds, spent = [], []
        for _ in range(args.rounds):
            pair = [
                json.loads(in_process(["--turn", peer, network], args))
                for peer in ("bncpu", "PyTorch")
            ]
            rounds.append([statistics.median(times) for times, _ in pair])
            spent.append(pair[0][1])
        ours, theirs = (1e3 * statistics.median(each) for each in zip(*rounds, strict=True))
        ratio = statistics.median(b / a for a, b in rounds)
        model, x, _ = problem(network, 1)
        count = multiplications(model, x)
        print(f"\n### {network}: {count / 1e6:.1f} million multiplications an image")
        print(
            f"\nA step of {args.batch} images, {args.threads} threads: bncpu {ours:.1f} ms, ",
            end="",
        )
        print(f"PyTorch {theirs:.1f} ms, {ratio:.2f}x of bncpu's\n")
        layers = {name: 1e3 * statistics.median(s[name] for s in spent) for name in spent[0]}
        print("| layers | ms of a step | |\n|---|---|---|")
        for name, ms in sorted(layers.items(), key=lambda item: -item[1]):
            print(f"| {name} | {ms:.2f} | {ms / sum(layers.values()):.0%} |")
        results[network] = {"bncpu": ours, "PyTorch": theirs, "ratio": ratio, "layers": layers}
    if args.json:
        with open(args.json, "w") as file:  # noqa: PTH123
            json.dump(results, file, indent=1)


def in_process(command, args):
    """Return what a turn prints, in a process of its own."""
    options = ["--batch", args.batch, "--steps", args.steps, "--threads", args.threads]
    line = [sys.executable, __file__, *command, *map(str, options)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
