"""The readers of files, what each may do with any bytes at all, and good files to begin from.

A reader gives what the bytes hold, or a ValueError that names the file; in memory and time that the
length of the file bounds, and with nothing half-changed. test_readers.py tries changed files, and
tools/fuzz_readers.py looks for others for as long as it is let.
"""

import gzip
import io
import json
import struct
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bncpu import nn, population
from bncpu.cli import train
from bncpu.data import cifar10, load_cifar10, load_mnist
from bncpu.data.mnist import FILES
from bncpu.experiments.runner import Kept


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def idx(array):
    """Return an array of bytes in the IDX format."""
    header = bytes([0, 0, 0x08, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def npy(array, version=None):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version, allow_pickle=False)
    return file.getvalue()


def squeezed(content):
    return gzip.compress(content, mtime=0)


class Images:
    """One of MNIST's files, beside three good ones."""

    def __init__(self, part, suffix="", encode=bytes):
        self.part, self.name, self.encode = part, FILES[part] + suffix, encode
        self.packed = squeezed if suffix and encode is bytes else bytes

    def good(self):
        rows = 4 if "train" in self.part else 3
        shapes = [(rows, 5, 4)] if self.part.startswith("x") else [(rows,)]
        arrays = [np.arange(np.prod(s), dtype=np.uint8).reshape(s) % 10 for s in shapes]
        return [self.packed(idx(array)) for array in arrays]

    def prepare(self, folder):
        for part, name in FILES.items():
            if part != self.part:
                (folder / name).write_bytes(Images(part).good()[0])

    def read(self, path):
        check_dataset(load_mnist(path.parent))


class Batches:
    """One of CIFAR-10's files, beside another good one."""

    def __init__(self, name, suffix="", encode=bytes):
        self.plain, self.name, self.encode = name, name + suffix, encode
        self.packed = squeezed if suffix and encode is bytes else bytes

    def good(self):
        records = np.arange(2 * cifar10.RECORD, dtype=np.uint32).astype(np.uint8).reshape(2, -1)
        records[:, 0] = [3, 9]
        return [self.packed(records.tobytes()), self.packed(records[:1].tobytes())]

    def prepare(self, folder):
        for name in ("data_batch_1.bin", cifar10.TEST_NAME):
            if name != self.plain:
                (folder / name).write_bytes(Batches(name).good()[0])

    def read(self, path):
        check_dataset(load_cifar10(path.parent))


def check_dataset(dataset):
    for x, y in (dataset[1:3], dataset[3:5]):
        assert (x.dtype, y.dtype) == (np.float32, np.int64)
        assert x.shape == (len(y), np.prod(dataset.image_shape))
        assert len(y) > 0
        assert x.min() >= 0
        assert x.max() <= 1
        assert y.min() >= 0
        assert y.max() <= 9


class Arrays:
    """A .npy file that is read for its moments."""

    name = "x.npy"
    encode = bytes

    def good(self):
        x = np.arange(24.0).reshape(4, 3, 2)
        arrays = [x, np.asfortranarray(x.astype(np.float32)), x.astype(">i2"), x[:0], x[0]]
        return [npy(a) for a in arrays] + [npy(x.astype(np.float16), (3, 0)), npy(x, (2, 0))]

    def prepare(self, folder):
        pass

    def read(self, path):
        for axis in (1, (0, 1)):
            files = population.open_files([path], axis)
            total = population.file_moments(files)
            assert total.mean.shape == total.m2.shape == files[0].channels.shape
            assert total.count == (files[0].channels.values if total.mean.size else 0)


class Checkpoints:
    """A checkpoint: what it holds, a model that takes it over, the settings of a training."""

    name = "run.safetensors"
    encode = bytes

    def __init__(self):
        self.model, self.optimizer = self._new()
        self.before = self._state()

    @staticmethod
    def _new():
        model = nn.fully_connected([3, 2, 2], rng=np.random.default_rng(5))
        return model, nn.SGD(0.3, 0.9)

    def _state(self):
        return self.model.state_dict() | {
            f"velocity {name}": a for name, a in self.optimizer.state_dict().items()
        }

    def good(self):
        found = []
        model, optimizer = self._new()
        for settings in (None, {"hidden": [2], "batch_size": 7, "learning_rate": 0.5}):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / self.name
                nn.save_checkpoint(path, model, optimizer, step=3, seed=4, settings=settings)
                found.append(path.read_bytes())
            nn.fit(model, optimizer, np.ones((4, 3), np.float32), np.arange(4) % 2, steps=1, seed=0)
        return found

    def prepare(self, folder):
        pass

    def read(self, path):
        checkpoint = nn.read_checkpoint(path)
        assert 0 <= checkpoint.step <= 2**53
        assert checkpoint.seed >= 0
        assert all(isinstance(line, str) for line in checkpoint.architecture)
        assert isinstance(checkpoint.settings, dict)
        absent = Namespace(**dict.fromkeys(train.DEFAULTS))
        error = None
        try:
            train.training_settings(absent, checkpoint)
        except ValueError as refused:
            error = refused
        try:
            checkpoint.restore(self.model, self.optimizer)
        except ValueError as refused:
            after = self._state()
            assert after.keys() == self.before.keys()
            assert all(same_bits(a, after[name]) for name, a in self.before.items())
            raise refused from error
        self.model, self.optimizer = self._new()
        if error:
            raise error


class Results:
    """A kept result of an experiment: taken, or measured again, and never an error."""

    encode = bytes

    def __init__(self):
        self.identity = {"experiment": "e", "version": 1}
        self.settings = {"seed": 0, "sizes": [3, 2]}
        self.name = Kept(Path(), self.identity)._path(self.settings).name

    def good(self):
        found = {"identity": self.identity, "settings": self.settings}
        return [
            json.dumps(found | {"measured": {"a": [1, 2.5]}, "seconds": 1.5}, indent=1).encode()
        ]

    def prepare(self, folder):
        pass

    def read(self, path):
        result = Kept(path.parent, self.identity).find(self.settings)
        if result is not None:
            assert result.settings == self.settings
            assert 0 <= result.seconds < np.inf
            assert all(isinstance(name, str) for name in result.measured)
            json.dumps(result.measured, allow_nan=False)


READERS = {
    "idx images": Images("x_train"),
    "idx labels": Images("y_test"),
    "idx gzip": Images("x_train", ".gz"),
    "idx in gzip": Images("x_train", ".gz", squeezed),
    "cifar10": Batches("data_batch_1.bin"),
    "cifar10 gzip": Batches(cifar10.TEST_NAME, ".gz"),
    "cifar10 in gzip": Batches(cifar10.TEST_NAME, ".gz", squeezed),
    "npy": Arrays(),
    "checkpoint": Checkpoints(),
    "results": Results(),
}


class Place(NamedTuple):
    """A folder in which a reader's file stands beside what else it reads."""

    reader: object
    path: Path


def placed(name, folder):
    reader = READERS[name]
    reader.prepare(folder)
    return Place(reader, folder / reader.name)


def read_any(place, content):
    """Have bytes read; return whether they were taken. What is not promised is an error."""
    place.path.write_bytes(place.reader.encode(content))
    try:
        place.reader.read(place.path)
    except ValueError as error:
        if not str(error).startswith(f"{place.path.parent}"):
            raise AssertionError(f"an error that does not begin with the file: {error}") from error
        return False
    return True
