"""The minimal trainer: enough to train the paper's networks, on bncpu's public functions only.

========================  ===========================================================
base.py                   Layer: what every layer is
linear.py, activations.py Linear; Sigmoid, Tanh, ReLU
containers.py             Sequential, which chains layers
losses.py                 SoftmaxCrossEntropy
optimizers.py             SGD, with momentum
training.py               fit: batches, steps, records; evaluate, inference
parallel.py               where the batch of a step is: in one process, or shared by ranks
networks.py               fully_connected: the network of the paper's section 4.1
checkpoint.py             a training run in a safetensors file, and back, bit for bit
arguments.py              the checks of numbers that all of these share
========================  ===========================================================

The layers take and return NumPy arrays of shape (n, features); `BatchNorm` is the package's own.
"""

from bncpu.layer import BatchNorm
from bncpu.nn.activations import ReLU, Sigmoid, Tanh
from bncpu.nn.base import Array, Layer
from bncpu.nn.checkpoint import Checkpoint, architecture, read_checkpoint, save_checkpoint
from bncpu.nn.containers import Sequential
from bncpu.nn.linear import Linear
from bncpu.nn.losses import SoftmaxCrossEntropy
from bncpu.nn.networks import fully_connected
from bncpu.nn.optimizers import SGD
from bncpu.nn.training import Record, evaluate, fit, inference, steps_per_epoch

__all__ = [
    "SGD",
    "Array",
    "BatchNorm",
    "Checkpoint",
    "Layer",
    "Linear",
    "ReLU",
    "Record",
    "Sequential",
    "Sigmoid",
    "SoftmaxCrossEntropy",
    "Tanh",
    "architecture",
    "evaluate",
    "fit",
    "fully_connected",
    "inference",
    "read_checkpoint",
    "save_checkpoint",
    "steps_per_epoch",
]
