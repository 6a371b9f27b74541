"""What batch norm costs a ResNet-50 in PyTorch on this CPU, before and after bncpu.torch.convert.

    python benchmarks/resnet.py                  # batch 32, 224 x 224: long, and 8 GB of memory
    python benchmarks/resnet.py --image 64 --threads 1
    python benchmarks/resnet.py --quick --json resnet.json

The network is written here in plain PyTorch: 3, 4, 6 and 3 bottleneck blocks, 53 batch norms. A
step is forward, loss, backward and SGD. PyTorch, the converted and the fused network take turns in
one process; times are medians, ratios medians of those of the rounds. The part of batch norm is
measured inside further steps by PyTorch's profiler, as users call it: checks, allocation and page
faults included. Ends with exit status 1 if a result is not equal within tolerance.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import bncpu.torch
from bncpu.atomic import atomic_write, check_writable
from bncpu.bench import measure
from bncpu.cli.numbers import positive

BLOCKS = (3, 4, 6, 3)
CLASSES = 10
RATE = 0.002
# Weight of the last batch norm of a block at first: small, as is usual, so that rounding errors do
# not grow from block to block.
LAST = 0.25
NAMES = ("PyTorch", "convert", "convert, fuse")
# Of the largest value. float64: rounding through 53 layers, and through some steps of training, in
# which it grows. What float32 may be off is a multiple of what PyTorch is.
TOLERANCE = 1e-10
TRAINED_TOLERANCE = 1e-5
ERRORS_OF_PYTORCH = 3.0
FORWARD = "batch norm, forward"
BACKWARD = "autograd::engine::evaluate_function: "
NORM = (FORWARD, BACKWARD + "NativeBatchNormBackward0", BACKWARD + "_BatchNormBackward")
RELU = ("aten::relu_", "aten::relu", BACKWARD + "ReluBackward0")


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions with batch norm, and the identity beside them."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        nn.init.constant_(self.bn3.weight, LAST)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return self.relu(out)


def resnet(blocks=BLOCKS, width=64):
    """Return the network."""
    layers = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = width
    for stage, number in enumerate(blocks):
        for block in range(number):
            stride = 2 if stage and not block else 1
            layers.append(Bottleneck(inputs, width << stage, stride))
            inputs = 4 * (width << stage)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES)]
    return nn.Sequential(*layers)


def contenders(model):
    """Return copies of a model by name."""
    made = (copy.deepcopy(model) for _ in NAMES)
    plain, converted, fused = made
    bncpu.torch.convert(converted)
    bncpu.torch.convert(fused, fuse=True)
    return dict(zip(NAMES, (plain, converted, fused), strict=True))


def batches(number, batch, image, dtype=torch.float32):
    """Yield images of noise about a pattern of their class, and the classes."""
    patterns = torch.randn(CLASSES, 3, image, image, dtype=dtype)
    for _ in range(number):
        labels = torch.randint(CLASSES, (batch,))
        yield patterns[labels] + torch.randn(batch, 3, image, image, dtype=dtype), labels


class Step:
    """One step of training, or one inference, with a network."""

    def __init__(self, model, images, labels, trains):
        self.model = model.train(trains)
        self.images, self.labels, self.trains = images, labels, trains
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)

    def __call__(self):
        """Return the loss, or nothing."""
        if not self.trains:
            with torch.inference_mode():
                self.model(self.images)
            return None
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def is_norm(module):
    """Tell a batch norm, PyTorch's or bncpu's."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def seconds_of_parts(step):
    """Return the seconds of a step, and therein of batch norm and of ReLU and additions."""
    norms = [module for module in step.model.modules() if is_norm(module)]
    ranges, handles = [], []

    def enter(*_):
        ranges.append(record_function(FORWARD))
        ranges[-1].__enter__()

    def leave(*_):
        ranges.pop().__exit__(None, None, None)

    for norm in norms:
        handles.append(norm.register_forward_pre_hook(enter))
        handles.append(norm.register_forward_hook(leave))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        begin = time.perf_counter()
        step()
        taken = time.perf_counter() - begin
    for handle in handles:
        handle.remove()
    parts = {"step": taken, "norm": 0.0, "rest": 0.0}
    for event in profiled.events():
        if event.name in NORM:
            parts["norm"] += event.cpu_time_total / 1e6
        elif event.name in RELU or (event.name == "aten::add_" and _is_image(event)):
            parts["rest"] += event.cpu_time_total / 1e6
    return parts


def _is_image(event):
    # The addition of a block, not that of an optimizer.
    shapes = event.input_shapes
    return len(shapes) > 1 and len(shapes[0]) == 4 and shapes[0] == shapes[1]


def in_turn(model, args, trains):
    """Return for each contender the seconds of steps, and of the parts of profiled steps."""
    images, labels = next(batches(1, args.batch, args.image))
    steps = {
        name: Step(copied, images, labels, trains) for name, copied in contenders(model).items()
    }
    timed = {name: [] for name in steps}
    parts = {name: [] for name in steps}
    for step in steps.values():
        step()
    order = list(steps.items())
    for _ in range(args.rounds):
        order.reverse()
        for name, step in order:
            begin = time.perf_counter()
            step()
            timed[name].append(time.perf_counter() - begin)
        for name, step in order:
            parts[name].append(seconds_of_parts(step))
    return timed, parts


def report(timed, parts, trains):
    """Print a table, and return its numbers."""
    what = "training step" if trains else "inference"
    print(f"\n### {what}\n")
    print(f"| | {what} | ratio | batch norm | share | ratio | with add and ReLU | share | ratio |")
    print("|---" * 9 + "|")
    rows = {}
    norm = {name: [p["norm"] for p in of] for name, of in parts.items()}
    both = {name: [p["norm"] + p["rest"] for p in of] for name, of in parts.items()}
    whole = {name: [p["step"] for p in of] for name, of in parts.items()}
    for name in NAMES:
        row = {"step": statistics.median(timed[name])}
        row["step_ratio"] = measure.ratio(timed[NAMES[0]], timed[name])
        for key, values in (("norm", norm), ("both", both)):
            row[key] = statistics.median(values[name])
            row[f"{key}_share"] = measure.ratio(values[name], whole[name])
            row[f"{key}_ratio"] = measure.ratio(values[NAMES[0]], values[name])
        rows[name] = row
        fused = name == NAMES[2]
        cells = [f"{row['step']:.3f} s", f"{row['step_ratio']:.2f}x"]
        for key in ("norm", "both"):
            # Fused, there is no batch norm by itself.
            cells += (
                ["", "", ""]
                if fused and key == "norm"
                else [
                    f"{row[key] * 1e3:.0f} ms",
                    f"{row[f'{key}_share']:.0%}",
                    f"{row[f'{key}_ratio']:.1f}x",
                ]
            )
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return rows


def results(model, images, labels):
    """Return output and gradients of a training step, and the output of inference after it."""
    model.train().zero_grad()
    y = model(images)
    nn.functional.cross_entropy(y, labels).backward()
    gradients = [parameter.grad.double() for parameter in model.parameters()]
    with torch.no_grad():
        z = model.eval()(images)
    return {"output": [y.detach().double()], "gradients": gradients, "inference": [z.double()]}


def difference(got, expected):
    """Return the largest difference of tensors, relative to the largest value of each."""
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True)
    )


def equality(model, image):
    """Print and return how far everybody is from PyTorch in float64, and whether that is near."""
    images, labels = next(batches(1, 8, image, torch.float64))
    wide = {name: copied.double() for name, copied in contenders(model).items()}
    found = {name: results(copied, images, labels) for name, copied in wide.items()}
    truth = found[NAMES[0]]
    narrow = {
        name: results(copied, images.float(), labels) for name, copied in contenders(model).items()
    }
    print(f"\n### largest difference from PyTorch in float64, batch 8, image {image}\n")
    print("| | float64 | | | float32 | | |\n|---|---|---|---|---|---|---|")
    print("| | " + " | ".join([*truth, *truth]) + " |")
    rows, near = {}, True
    for name in NAMES:
        of64 = {key: difference(found[name][key], truth[key]) for key in truth}
        of32 = {key: difference(narrow[name][key], truth[key]) for key in truth}
        rows[name] = {"float64": of64, "float32": of32}
        allowed = rows[NAMES[0]]["float32"]
        near &= all(error <= TOLERANCE for error in of64.values())
        near &= all(error <= ERRORS_OF_PYTORCH * allowed[key] for key, error in of32.items())
        print(
            f"| {name} | " + " | ".join(f"{e:.1e}" for e in (*of64.values(), *of32.values())), "|"
        )
    return rows, near


def curves(model, args):
    """Print and return the losses of a short training, and whether they are PyTorch's."""
    data = list(batches(args.steps, args.batch, args.curve_image))
    models = contenders(model)
    wide = {f"{name}, float64": contenders(model)[name].double() for name in (NAMES[0], NAMES[2])}
    losses = {}
    for name, copied in (models | wide).items():
        step = Step(copied, None, None, True)
        dtype = torch.float64 if name in wide else torch.float32
        losses[name] = []
        for images, step.labels in data:
            step.images = images.to(dtype)
            losses[name].append(step())
    truth = losses[f"{NAMES[0]}, float64"]
    print(f"\n### training loss, batch {args.batch}, image {args.curve_image}\n")
    shown = sorted({*range(0, args.steps, max(1, args.steps // 5)), args.steps - 1})
    print("| step | " + " | ".join(map(str, shown)) + " | largest difference from float64 |")
    print("|---" * (len(shown) + 2) + "|")
    away = {}
    for name, values in losses.items():
        away[name] = max(abs(a - b) for a, b in zip(values, truth, strict=True))
        cells = " | ".join(f"{values[i]:.4f}" for i in shown)
        print(f"| {name} | {cells} | {away[name]:.1e} |", flush=True)
    near = all(away[name] <= ERRORS_OF_PYTORCH * away[NAMES[0]] for name in NAMES)
    return losses, near and all(away[name] <= TRAINED_TOLERANCE for name in wide)


def parser():
    """Return the options."""
    made = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--batch", type=positive, default=32, metavar="N")
    made.add_argument("--image", type=positive, metavar="PIXELS", help="default: 224")
    made.add_argument("--rounds", type=positive, metavar="N", help="of all contenders; default: 5")
    made.add_argument("--steps", type=positive, metavar="N", help="of the loss curve; default: 20")
    made.add_argument("--threads", type=positive, default=torch.get_num_threads(), metavar="N")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="image 64, 3 rounds, 6 steps")
    made.add_argument("--json", type=Path, metavar="FILE")
    return made


def main(argv=None):
    """Measure, compare, and say whether everything is near enough."""
    args = parser().parse_args(argv)
    args.image = args.image or (64 if args.quick else 224)
    args.rounds = args.rounds or (3 if args.quick else 5)
    args.steps = args.steps or (6 if args.quick else 20)
    args.curve_image = min(args.image, 64)
    if args.json:
        check_writable(args.json)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = resnet()
    facts = {"torch": torch.__version__, "bncpu": bncpu.__version__, "threads": args.threads}
    facts |= {"batch": args.batch, "image": args.image, "level": bncpu.config()["level chosen"]}
    print("\n".join(f"{name:<8} {value}" for name, value in facts.items()), flush=True)
    document = dict(facts)
    for name, trains in (("training", True), ("inference", False)):
        document[name] = report(*in_turn(model, args, trains), trains)
    document["equality"], equal = equality(model, args.curve_image)
    document["losses"], follow = curves(model, args)
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(document, indent=1).encode())
    verdicts = {"outputs and gradients": equal, "loss curves": follow}
    print()
    for what, near in verdicts.items():
        print(f"{what}: {'equal within tolerance' if near else 'TOO FAR APART'}")
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
