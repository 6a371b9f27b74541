"""Checkpoints: exact resumption, files whole or not at all, and every damaged file refused."""

import json
import sys

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from accuracy import assert_same_bits

from bncpu import nn
from bncpu.atomic import check_writable


def network(sizes=(6, 7, 5, 4), seed=5, **options):
    return nn.fully_connected(sizes, rng=np.random.default_rng(seed), **options)


def examples():
    rng = np.random.default_rng(0)
    return rng.standard_normal((61, 6)).astype(np.float32), rng.integers(0, 4, 61)


def state(model, optimizer):
    return model.state_dict() | {"v." + k: v for k, v in optimizer.state_dict().items()}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert_same_bits(a[name], b[name], name)


@pytest.fixture
def saved(tmp_path):
    """Return the path of a checkpoint at step 10."""
    model, optimizer = network(), nn.SGD(0.3, 0.9)
    nn.fit(model, optimizer, *examples(), steps=10, batch_size=10, seed=4)
    path = tmp_path / "run.safetensors"
    nn.save_checkpoint(path, model, optimizer, step=10, seed=4, settings={"note": [1, "a"]})
    return path


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_resumption_is_exact(tmp_path, momentum, dtype):
    x, y = examples()
    x = x.astype(dtype)
    whole, optimizer = network(dtype=dtype), nn.SGD(0.3, momentum)
    nn.fit(whole, optimizer, x, y, steps=20, batch_size=10, seed=4)
    expected = state(whole, optimizer)

    first, optimizer = network(dtype=dtype), nn.SGD(0.3, momentum)
    nn.fit(first, optimizer, x, y, steps=10, batch_size=10, seed=4)
    nn.save_checkpoint(tmp_path / "half", first, optimizer, step=10, seed=4)

    second, optimizer = network(seed=99, dtype=dtype), nn.SGD(0.3, momentum)
    checkpoint = nn.read_checkpoint(tmp_path / "half")
    checkpoint.restore(second, optimizer)
    assert (checkpoint.step, checkpoint.seed) == (10, 4)
    options = {"batch_size": 10, "seed": checkpoint.seed, "start": checkpoint.step}
    nn.fit(second, optimizer, x, y, steps=10, **options)
    assert_same_state(state(second, optimizer), expected)


def test_equal_runs_write_equal_files(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_the_file_says(saved):
    checkpoint = nn.read_checkpoint(saved)
    assert checkpoint.settings == {"note": [1, "a"]}
    assert checkpoint.architecture == nn.architecture(network())
    assert checkpoint.velocity.keys() == network().parameters().keys()


def test_another_program_finds_pytorchs_names(saved):
    arrays = safetensors.numpy.load_file(saved)
    model = {name: a for name, a in arrays.items() if not name.startswith("velocity.")}
    expected = network().state_dict()
    assert {n: (a.shape, a.dtype) for n, a in model.items()} == {
        n: (a.shape, a.dtype) for n, a in expected.items()
    }
    assert set(arrays) - set(model) == {f"velocity.{name}" for name in network().parameters()}


def test_without_momentum_the_velocity_is_dropped(saved):
    model, optimizer = network(), nn.SGD(0.3)
    nn.read_checkpoint(saved).restore(model, optimizer)
    assert optimizer.velocity == {}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (network((6, 8, 5, 4)), r"layer 0 is Linear\(6, 7, bias=False\) .* Linear\(6, 8"),
        (network((6, 7, 4)), r"layer 3 is Linear\(7, 5, bias=False\) .* Linear\(7, 4\)"),
        (network((6, 7, 5, 4, 3)), r"layer 6 is Linear\(5, 4\) .* Linear\(5, 4, bias=False\)"),
        (network(batch_norm=False), r"layer 0 is .* and Linear\(6, 7\) float32 in the model"),
        (network(activation=nn.ReLU), r"layer 2 is Sigmoid\(\) in the file and ReLU\(\)"),
        (network(dtype=np.float64), r"layer 0 is .* float32 in the file .* float64 in the model"),
        (nn.Sequential(), r"layer 0 is .* in the file and no layer in the model"),
    ],
)
def test_another_architecture_is_refused(saved, other, message):
    optimizer = nn.SGD(0.3, 0.9)
    before = other.state_dict()
    with pytest.raises(ValueError, match=rf"run\.safetensors: another architecture; {message}"):
        nn.read_checkpoint(saved).restore(other, optimizer)
    assert_same_state(other.state_dict(), before)
    assert optimizer.velocity == {}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((6, 7, 8, 4), r"linear layer 1 have shape \(5, 7\) in the file and \(8, 7\) in"),
        ((6, 7, 5), r"linear layer 2 have shape \(4, 5\) in the file and none in the model"),
        ((6, 7, 5, 4, 3), r"linear layer 3 have shape none in the file and \(3, 4\) in the model"),
        ((10**7,) * 3, r"linear layer 0 have shape \(7, 6\) in the file and \(10000000, "),
    ],
)
def test_sizes_are_compared_without_a_model(saved, sizes, message):
    checkpoint = nn.read_checkpoint(saved)
    checkpoint.check_sizes((6, 7, 5, 4))
    with pytest.raises(ValueError, match=rf"run\.safetensors: another architecture; .*{message}"):
        checkpoint.check_sizes(sizes)


def test_a_model_need_not_be_a_chain(tmp_path):
    def model(seed, outputs=2):
        return nn.Linear(3, outputs, rng=np.random.default_rng(seed))

    written, read = model(0), model(1)
    nn.save_checkpoint(tmp_path / "run", written, nn.SGD(0.1), step=0, seed=0)
    checkpoint = nn.read_checkpoint(tmp_path / "run")
    checkpoint.restore(read, nn.SGD(0.1))
    assert_same_state(read.state_dict(), written.state_dict())
    with pytest.raises(ValueError, match=r"layer 0 is Linear\(3, 2\) float32 in the file"):
        checkpoint.restore(model(0, 4), nn.SGD(0.1))


def test_a_synchronised_layer_is_told_as_a_plain_one_at_any_depth():
    MPI = pytest.importorskip("mpi4py.MPI", exc_type=(ImportError, RuntimeError))  # noqa: N806
    plain, synchronised = (network(comm=comm) for comm in (None, MPI.COMM_SELF))
    nested = [nn.architecture(nn.Sequential(nn.Sequential(m))) for m in (plain, synchronised)]
    assert nested[0] == nested[1]
    assert "Sigmoid" in nested[0][0]


def test_layers_from_the_tenth_on_are_in_order(tmp_path):
    sizes = (6, 7, 5, 4, 9, 8, 3)
    nn.save_checkpoint(tmp_path / "deep", network(sizes), nn.SGD(0.1), step=0, seed=0)
    nn.read_checkpoint(tmp_path / "deep").check_sizes(sizes)


def rewrite(path, description=None, arrays=None):
    """Write the file again: another text as its description, or some arrays changed, None gone."""
    all_arrays = safetensors.numpy.load_file(path) | (arrays or {})
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    if description is not None:
        metadata["bncpu"] = description
    content = {name: array for name, array in all_arrays.items() if array is not None}
    path.write_bytes(safetensors.numpy.save(content, metadata))


def assert_refused(path, message):
    model, optimizer = network(seed=6), nn.SGD(0.3, 0.9)
    before = state(model, optimizer)
    with pytest.raises(ValueError, match=rf"run\.safetensors: {message}"):
        nn.read_checkpoint(path).restore(model, optimizer)
    assert_same_state(state(model, optimizer), before)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_a_foreign_file_is_refused(saved, metadata):
    saved.write_bytes(safetensors.numpy.save(network().state_dict(), metadata))
    assert_refused(saved, "a safetensors file, but not a checkpoint of bncpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 7}, "a checkpoint of version 7; this bncpu reads version 1"),
        ({"step": -3}, r"its description is damaged \(step is -3\)"),
        ({"step": 10**30}, r"its description is damaged \(step is 10{30}\)"),
        ({"step": True}, r"its description is damaged \(step is True\)"),
        ({"seed": "x"}, r"its description is damaged \(seed is 'x'\)"),
        ({"architecture": 3}, r"its description is damaged \(architecture is 3\)"),
        ({"settings": None}, r"its description is damaged \(settings is None\)"),
        ("{", r"its description is damaged \(Expecting"),
        ("[" * 100_000, r"its description is damaged \("),
        ("[]", r"its description is damaged \(not a mapping\)"),
    ],
)
def test_a_damaged_description_is_refused(saved, change, message):
    if isinstance(change, dict):
        with safetensors.safe_open(saved, framework="numpy") as file:
            change = json.dumps(json.loads(file.metadata()["bncpu"]) | change)
    rewrite(saved, description=change)
    assert_refused(saved, message)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("n", np.zeros(2, np.float16), "n has dtype F16, which no layer has"),
        ("n", np.zeros(2), "does not fit the model; state: unexpected n"),
        ("6.bias", None, r"does not fit the model; state: missing 6\.bias"),
        ("velocity.6.bias", None, r"does not fit the model; state: missing 6\.bias"),
        ("1.running_var", np.full(7, -1, np.float32), r".* 1\.running_var: expected no negative"),
        (
            "1.num_batches_tracked",
            np.array(-7),
            r".* 1\.num_batches_tracked: expected a count; got",
        ),
        ("0.weight", np.zeros((7, 7)), r".* 0\.weight: expected shape \(7, 6\); got \(7, 7\)"),
        ("velocity.0.weight", np.zeros(7), r".* 0\.weight: expected shape \(7, 6\); got \(7,\)"),
        ("0.weight", np.zeros((7, 6), int), r".* 0\.weight: expected dtype float32; got int64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(saved, name, array, message):
    rewrite(saved, arrays={name: array})
    assert_refused(saved, message)


def test_a_file_cut_short_anywhere_is_refused(saved):
    content = saved.read_bytes()
    header = int.from_bytes(content[:8], "little")
    for length in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match="damaged, cut short, or not a safetensors file"):
            nn.read_checkpoint(saved)


@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04" + bytes(60), b"\x80\x04" + b"pickle" * 9, b"\xff" * 40, b'{"a": 1}' * 8],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.bin: damaged, cut short, or not a safetensors"):
        nn.read_checkpoint(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        nn.read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError):
        nn.read_checkpoint(tmp_path)


def save(path):
    nn.save_checkpoint(path, network(seed=8), nn.SGD(0.1), step=0, seed=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("old", [None, b"the old file"])
@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_an_interrupted_save_leaves_no_file_or_the_old_one(
    tmp_path, monkeypatch, error, old, moment
):
    path = tmp_path / "run.safetensors"
    if old is not None:
        path.write_bytes(old)

    def interrupt(*_):
        assert len(list(tmp_path.glob(".*.part"))) == 1
        raise error

    monkeypatch.setattr(moment, interrupt)
    with pytest.raises(error):
        save(path)
    assert [p.name for p in tmp_path.iterdir()] == ([path.name] if old is not None else [])
    assert old is None or path.read_bytes() == old


def test_a_save_replaces_the_file_and_leaves_a_link_in_place(tmp_path):
    path, link = tmp_path / "run", tmp_path / "latest"
    path.write_bytes(b"old")
    link.symlink_to(path)
    save(link)
    assert link.is_symlink()
    assert nn.read_checkpoint(path).step == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "run"]


def test_an_error_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    def refuse(path, _):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    for write in (save, check_writable):
        with pytest.raises(PermissionError) as error:
            write(tmp_path / "run")
        assert error.value.filename == str(tmp_path / "run")


def test_without_safetensors(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    message = r'checkpoints: need safetensors; pip install "bncpu\[train\]"'
    with pytest.raises(ImportError, match=message):
        save(saved.with_name("other"))
    with pytest.raises(ImportError, match=message):
        nn.read_checkpoint(saved)
    assert not saved.with_name("other").exists()


def test_where_nothing_can_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    for path, error, message in (
        (tmp_path / "no" / "run", FileNotFoundError, r"no.run: its folder does not exist"),
        (file / "run", OSError, r"file.run: its folder does not exist"),
        (tmp_path, OSError, r": exists and is not a regular file"),
    ):
        for write in (save, check_writable):
            with pytest.raises(error, match=message):
                write(path)
    check_writable(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert file.read_bytes() == b""


def test_the_description_is_plain_json(saved):
    with safetensors.safe_open(saved, framework="numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata["bncpu"])["architecture"][0] == "Linear(6, 7, bias=False) float32"
