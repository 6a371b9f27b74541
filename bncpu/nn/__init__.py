"""The minimal trainer: enough to train the paper's networks, on bncpu's public functions.

Of what is not public it uses the threads on which the kernels run (workers.py).

========================  ===========================================================
base.py                   Layer: what every layer is
linear.py, activations.py Linear; Sigmoid, Tanh, ReLU
convolution.py            Conv2d, by im2col on BLAS
pooling.py                MaxPool2d, AvgPool2d, GlobalAvgPool, Flatten
lrn.py                    LocalResponseNorm
windows.py                the windows of an image, for convolution and pooling
initialization.py         Gaussian initial weights
recurrent.py              RNN, plain or with batch normalisation at every time step
containers.py             Sequential; Concat, the branches of Inception; Residual
losses.py                 SoftmaxCrossEntropy
optimizers.py             SGD, with momentum and L2
schedules.py              ExponentialDecay, StepDecay: the learning rate over time
dropout.py                Dropout
augmentation.py           Flip, Shift, PhotometricDistortion, Compose: training images varied
training.py               fit: batches, steps, records; predict, evaluate, inference
population.py             population_statistics: Algorithm 2 over a training set
recording.py              recording: what layers inside a model are given
parallel.py               where the batch of a step is: in one process, or shared by ranks
networks.py               fully_connected, inception: the networks of the paper's sections 4.1, 4.2
workers.py                the images of a batch shared out among threads
buffers.py                the memory of results that are gone, taken again
checkpoint.py             a training run in a safetensors file, and back, bit for bit
arguments.py              the checks of numbers that all of these share
========================  ===========================================================

The layers take and return arrays of shape (n, features) or (N, C, H, W); `BatchNorm` is that of the
package.
"""

from bncpu.layer import BatchNorm
from bncpu.nn.activations import ReLU, Sigmoid, Tanh
from bncpu.nn.augmentation import Compose, Flip, PhotometricDistortion, Shift
from bncpu.nn.base import Array, Layer
from bncpu.nn.checkpoint import Checkpoint, architecture, read_checkpoint, save_checkpoint
from bncpu.nn.containers import Concat, Residual, Sequential
from bncpu.nn.convolution import Conv2d
from bncpu.nn.dropout import Dropout
from bncpu.nn.linear import Linear
from bncpu.nn.losses import SoftmaxCrossEntropy
from bncpu.nn.lrn import LocalResponseNorm
from bncpu.nn.networks import fully_connected, inception
from bncpu.nn.optimizers import SGD
from bncpu.nn.pooling import AvgPool2d, Flatten, GlobalAvgPool, MaxPool2d
from bncpu.nn.population import population_statistics
from bncpu.nn.recording import recording
from bncpu.nn.recurrent import RNN
from bncpu.nn.schedules import ExponentialDecay, StepDecay
from bncpu.nn.training import Record, evaluate, fit, inference, predict, steps_per_epoch

__all__ = [
    "RNN",
    "SGD",
    "Array",
    "AvgPool2d",
    "BatchNorm",
    "Checkpoint",
    "Compose",
    "Concat",
    "Conv2d",
    "Dropout",
    "ExponentialDecay",
    "Flatten",
    "Flip",
    "GlobalAvgPool",
    "Layer",
    "Linear",
    "LocalResponseNorm",
    "MaxPool2d",
    "PhotometricDistortion",
    "ReLU",
    "Record",
    "Residual",
    "Sequential",
    "Shift",
    "Sigmoid",
    "SoftmaxCrossEntropy",
    "StepDecay",
    "Tanh",
    "architecture",
    "evaluate",
    "fit",
    "fully_connected",
    "inception",
    "inference",
    "population_statistics",
    "predict",
    "read_checkpoint",
    "recording",
    "save_checkpoint",
    "steps_per_epoch",
]
