"""Whatever a file holds: a reader gives data or a ValueError that names the file, and no more.

What each reader must do is in readers.py. Good files are cut, lengthened, flipped and pieced
together here; bytes that were found by tools/fuzz_readers.py to break a reader stand by themselves.
"""

import gzip
import json
import struct
import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.numpy
from accuracy import assert_same_bits
from hypothesis import HealthCheck, given, settings
from readers import READERS, idx, npy, placed, read_any

import bncpu
from bncpu import nn, population
from bncpu.data import files, mnist
from bncpu.experiments.runner import Kept

# A large number in a header, whatever its place and width.
LARGE = [b"\xff" * 4, b"\xff" * 8, b"\x7f" + b"\xff" * 3, b"9" * 12, b"9" * 20, b"-1", b"\0" * 8]


@st.composite
def changed(draw, good):
    """Draw the bytes of a good file with up to four changes."""
    content = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        how = draw(st.sampled_from(["cut", "flip", "byte", "large", "insert", "drop", "repeat"]))
        if how == "cut":
            del content[at:]
        elif how == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte" and at < len(content):
            content[at] = draw(st.integers(0, 255))
        elif how == "large":
            number = draw(st.sampled_from(LARGE))
            content[at : at + len(number)] = number
        elif how == "insert":
            content[at:at] = draw(st.binary(max_size=9))
        elif how == "drop":
            del content[at : at + draw(st.integers(1, 9))]
        else:
            content[at:at] = content[max(at - draw(st.integers(1, 40)), 0) : at]
    return bytes(content)


@pytest.mark.parametrize("name", READERS)
def test_good_files_are_taken(tmp_path, name):
    place = placed(name, tmp_path)
    for content in place.reader.good():
        assert read_any(place, content)


@pytest.mark.parametrize("name", READERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(data=st.data())
def test_changed_files(tmp_path, name, data):
    """In as much memory as the file could fill, unzipped, and as reading takes anyway."""
    place = placed(name, tmp_path)
    content = data.draw(changed(place.reader.good()))
    tracemalloc.start()
    try:
        read_any(place, content)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    unzipped = files.MAX_DEFLATE_RATIO if place.path.suffix == ".gz" else 1
    assert most < (1 << 22) + 20 * len(content) * unzipped


@pytest.mark.parametrize("name", READERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(content=st.binary(max_size=200))
def test_any_bytes(tmp_path, name, content):
    read_any(placed(name, tmp_path), content)


def header(text, version=(1, 0)):
    """Return a .npy file of a header alone."""
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text.encode()


def of_shape(shape):
    return repr({"descr": "<f8", "fortran_order": False, "shape": shape})


@pytest.mark.parametrize(
    "content",
    [
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (3 }"),  # TokenError
        header("{'descr': '<f8', 'fortran_order': False, 'shape': " + "(" * 500),
        header("-" * 9000 + "1"),
        header("{'descr': " + "-" * 9000 + "1, 'fortran_order': False, 'shape': (3,)}"),
        header(of_shape((0, 10**5))),
        header(of_shape((0, 2**70))),
        header(of_shape((0, 2**62, 2**62))),
        header(of_shape((-1, -8))) + bytes(64),
        header(of_shape((3, True))) + bytes(24),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1)}") + b"cos\nsystem\n",
        header("{'descr': '\\0', 'fortran_order': False, 'shape': (3,)}"),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (3,)}" + " " * 20_000, (2, 0)),
        header("\x00"),
        b"\x93NUMPY\x00\x00" + bytes(3) + b"\x7f",
        b"\x93NUMPY\x02\x00" + b"\xff" * 4 + bytes(90),
        b"\x93NUMPY\x09\x00\x10\x00",
    ],
    ids=range(16),
)
def test_headers_of_arrays(tmp_path, content):
    """Whatever Python makes of them; no memory is made for what is not there."""
    tracemalloc.start()
    read_any(placed("npy", tmp_path), content)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 22


def test_a_header_alone_makes_no_channels(tmp_path):
    """An array without values says nothing that its 2**40 channels could be held to."""
    path = tmp_path / "x.npy"
    path.write_bytes(header(of_shape((0, 2**40))))
    tracemalloc.start()
    moments = population.file_moments(population.open_files([path]))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (moments.count, moments.mean.shape) == (0, (2**40,))
    assert most < 1 << 20
    path.write_bytes(npy(np.empty((0, 4))))
    assert_same_bits(population.file_moments(population.open_files([path])).mean, np.zeros(4))


def test_a_zipped_header_is_believed_up_to_a_limit(tmp_path, monkeypatch):
    path = tmp_path / "images.gz"
    content = idx(np.zeros((2, 100, 100), np.uint8))
    path.write_bytes(gzip.compress(content))
    assert mnist.read_idx(path, 3).shape == (2, 100, 100)
    monkeypatch.setattr(mnist, "MAX_UNZIPPED", 19_999)
    with pytest.raises(ValueError, match=r"promises 20000 bytes, it holds at most 19999"):
        mnist.read_idx(path, 3)


def test_a_bomb_is_not_unpacked(tmp_path):
    """What holds a thousand times its length behind a small header is not read on."""
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((1, 2, 2), np.uint8)) + bytes(1 << 24), 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match="longer than the 4 bytes"):
        mnist.read_idx(path, 3)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 22


FOUND = {"identity": {}, "settings": {}, "measured": {"a": 1}, "seconds": 2}


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"identity": {}, "settings": {}, "measured": {}, "seconds": 1' + b"0" * 400 + b"}",
        json.dumps(FOUND | {"seconds": float("nan")}).encode(),
        json.dumps(FOUND | {"seconds": -1}).encode(),
        json.dumps(FOUND | {"measured": [["a", 1]]}).encode(),
        json.dumps(FOUND | {"measured": {"a": float("inf")}}).encode(),
        b"\xff\xfe",
        b"null",
    ],
    ids=range(8),
)
def test_what_is_no_result_is_measured_again(tmp_path, content):
    kept = Kept(tmp_path, {})
    kept._path({}).write_bytes(content)
    assert kept.find({}) is None
    kept._path({}).write_bytes(json.dumps(FOUND).encode())
    assert kept.find({}).measured == {"a": 1}


def checkpoint(path, description=None, header=None, data=b""):
    """Write a checkpoint of no arrays with another description, or a header as it is given."""
    good = {"version": 1, "step": 0, "seed": 0, "architecture": [], "settings": {}}
    text = json.dumps(good | (description or {}))
    if header is None:
        path.write_bytes(safetensors.numpy.save({}, {"bncpu": text}))
        return
    content = json.dumps({"__metadata__": {"bncpu": text}} | header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": True}, "a checkpoint of version True; this bncpu reads version 1$"),
        ({"version": 1.0}, r"a checkpoint of version 1\.0; this"),
        ({"version": "9" * 10**6}, "a checkpoint of version 9{40}; this"),
        ({"architecture": [1]}, r"its description is damaged \(a layer is 1\)"),
        ({"architecture": ["a", None]}, r"its description is damaged \(a layer is None\)"),
    ],
)
def test_a_description_that_is_none(tmp_path, change, message):
    path = tmp_path / "run.safetensors"
    checkpoint(path, change)
    with pytest.raises(ValueError, match=rf"^{path}: {message}"):
        nn.read_checkpoint(path)


@pytest.mark.parametrize("shape", [[0, 2**62], [2**62, 0], [0, 2**40, 2**40], [1] * 80, [2**40]])
def test_shapes_that_no_array_has(tmp_path, shape):
    path = tmp_path / "run.safetensors"
    size = 0 if 0 in shape else 4
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    checkpoint(path, header={"0.weight": entry}, data=bytes(size))
    with pytest.raises(ValueError, match=rf"^{path}: "):
        nn.read_checkpoint(path).restore(nn.Linear(2, 2, rng=np.random.default_rng(0)), nn.SGD(1))


@pytest.mark.parametrize("errors", ["ignore", "raise"])
def test_a_state_beyond_float32_is_taken_over_whole(errors):
    """Whatever NumPy is told to do about overflow, and so never in part."""
    layer = bncpu.BatchNorm(2)
    state = {name: np.asarray(a + 3.0, np.float64) for name, a in layer.state_dict().items()}
    state["running_mean"][1] = 1e300
    with np.errstate(all=errors):
        layer.load_state_dict(state)
    np.testing.assert_array_equal(layer.running_mean, [3, np.inf])
    np.testing.assert_array_equal(layer.running_var, [4, 4])
    assert layer.num_batches_tracked == 3
