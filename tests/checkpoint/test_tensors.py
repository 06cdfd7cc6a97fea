"""The safetensors streams, the strict JSON and the manifest, against the library that owns the format and against attacks.

python -m pytest tests/checkpoint/test_tensors.py
"""

import hashlib
import io
import json
import math

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient_t5.checkpoint import manifest, strict_json, tensors
from resilient_t5.checkpoint.tensors import snapshot_bytes, take_snapshot
from resilient_t5.files import FileSystem, make_directories, read_bounded, remove_tree, replace_file
from tests.checkpoint.harness import commit, live_names, make_manager, make_parts, same_tensors


class Bytes:
    """A byte source in memory."""

    def __init__(self, data):
        self._stream = io.BytesIO(data)

    def fill(self, buffer):
        if self._stream.readinto(buffer) != len(buffer):
            raise ValueError("ends early")


def to_bytes(part):
    layout = tensors.lay_out(part)
    data = b"".join(bytes(chunk) for chunk in tensors.chunks(layout))
    assert len(data) == layout.size
    return data, layout.shared


def random_bits(dtype, shape):
    count = math.prod(shape) * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", tensors.DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5,), (2, 3, 4)])
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype, shape):
    """NaN payloads included, as bits are compared."""
    part = {"a": random_bits(dtype, shape), "b": torch.ones(3)}
    data, shared = to_bytes(part)
    assert shared == {}
    assert same_tensors({"x": tensors.read_tensors(Bytes(data), len(data), shared)}, {"x": part})


def test_views_that_are_not_contiguous_come_back_as_their_values():
    """A transpose, a slice, an expanded tensor, and one element of a strided one."""
    base = torch.arange(12.0).reshape(3, 4)
    part = {"t": base.t(), "s": base[:, ::2], "e": torch.tensor([1.0]).expand(4), "o": base[0, ::3][:1]}
    data, shared = to_bytes(part)
    loaded = tensors.read_tensors(Bytes(data), len(data), shared)
    assert all(torch.equal(loaded[name], part[name]) for name in part)


def test_the_library_that_owns_the_format_reads_our_files_and_we_read_its():
    """The same names, dtypes and bits both ways."""
    part = {name: random_bits(dtype, (2, 3)) for name, dtype in tensors.DTYPES.items() if dtype.itemsize > 1}
    part["zero"] = torch.tensor(1.5)
    data, _ = to_bytes(part)
    assert same_tensors({"x": safetensors.torch.load(data)}, {"x": part})
    theirs = safetensors.torch.save(part)
    assert same_tensors({"x": tensors.read_tensors(Bytes(theirs), len(theirs), {})}, {"x": part})


def test_a_large_tensor_crosses_the_chunk_boundary_unharmed():
    """More than one chunk of it, and a tail."""
    part = {"big": torch.randint(0, 256, (tensors.CHUNK_BYTES * 2 + 17,), dtype=torch.uint8)}
    data, _ = to_bytes(part)
    assert torch.equal(tensors.read_tensors(Bytes(data), len(data), {})["big"], part["big"])


def test_the_same_tensors_always_give_the_same_bytes():
    """The order of the names in the dictionary does not matter; two checkpoints can be compared by hash."""
    one = {"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.int8), "c": torch.tensor(1.0)}
    assert to_bytes(one)[0] == to_bytes(dict(reversed(one.items())))[0]


def test_each_loaded_tensor_owns_its_memory():
    """A loaded tensor can be freed as soon as it is on the device."""
    data, _ = to_bytes({"a": torch.ones(1000), "b": torch.ones(1000)})
    loaded = tensors.read_tensors(Bytes(data), len(data), {})
    assert all(tensor.untyped_storage().nbytes() == 4000 for tensor in loaded.values())


@pytest.mark.parametrize(
    "tensor", [torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex64)]
)
def test_a_tensor_that_the_format_cannot_hold_is_refused_before_anything_is_written(tensor):
    """By name."""
    with pytest.raises(TypeError, match="odd"):
        tensors.lay_out({"odd": tensor})


@pytest.mark.parametrize("name", ["", "__metadata__", "$float"])
def test_a_name_that_means_something_else_in_the_header_is_refused(name):
    """It would not come back."""
    with pytest.raises(TypeError, match="cannot name"):
        tensors.lay_out({name: torch.ones(1)})


def header(fields, tail=b""):
    text = json.dumps(fields).encode() if not isinstance(fields, bytes) else fields
    return len(text).to_bytes(8, "little") + text + tail


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 8 + b"{}",
        header(b"not json"),
        header(b'{"a": 1, "a": 1}'),
        header(b'{"a": NaN}'),
        header(b"[" * 100_000),
        header([]),
        header({"a": 1}, b"12345678"),
        header({"a": entry(dtype="F31")}, b"12345678"),
        header({"a": entry(shape=(3,))}, b"12345678"),
        header({"a": entry(shape=(-2,), offsets=(0, -8))}),
        header({"a": entry(shape=(2.0,))}, b"12345678"),
        header({"a": entry(shape=(True, 2))}, b"12345678"),
        header({"a": entry(offsets=(1, 9))}, b"123456789"),
        header({"a": entry()}, b"1234567"),
        header({"a": entry()}, b"123456789"),
        header({"a": entry(), "b": entry()}, b"12345678"),
        header({"a": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}),
        header({"a": entry(shape=(1,) * 17, offsets=(0, 4))}, b"1234"),
        header({"a": {**entry(), "more": 1}}, b"12345678"),
    ],
)
def test_a_hostile_file_is_refused_before_memory_is_taken(data):
    """Always ValueError, whatever the header claims."""
    with pytest.raises(ValueError):
        tensors.read_tensors(Bytes(data), len(data), {})


@pytest.mark.parametrize("shared", [{"x": "missing"}, {"a": "a"}, {"a": "b"}])
def test_a_shared_map_that_does_not_fit_is_refused(shared):
    """An alias must be new and its owner there."""
    data, _ = to_bytes({"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(ValueError, match="shared"):
        tensors.read_tensors(Bytes(data), len(data), shared)


def test_only_tensors_that_are_the_same_memory_in_the_same_shape_are_shared():
    """A view of another shape, an equal copy, and empty tensors are written on their own."""
    base = torch.arange(6.0)
    part = {
        "a": base,
        "b": base,
        "flat": base.view(2, 3),
        "copy": base.clone(),
        "e1": torch.empty(0),
        "e2": torch.empty(0),
    }
    assert tensors.split_shared(part)[1] == {"b": "a"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner),
    max_leaves=12,
)


def same(one, other):
    if isinstance(one, float) or isinstance(other, float):
        return type(one) is type(other) and (one == other and math.copysign(1, one) == math.copysign(1, other) or one != one)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_a_state_comes_back_as_it_was(value):
    """Every float bit for bit, NaN and infinities too, integers of any size, any text."""
    data = strict_json.dump(value)
    assert same(strict_json.load(data), value)
    json.loads(data, parse_constant=pytest.fail)


@pytest.mark.parametrize("value", [{1: 2}, {"a": {None: 1}}, {"$float": "nan"}, {1, 2}, b"x", torch.ones(1), object()])
def test_a_state_that_would_come_back_as_something_else_is_refused(value):
    """At the save, not at the resume."""
    with pytest.raises(TypeError):
        strict_json.dump(value)


@pytest.mark.parametrize(
    "data",
    [b"\xff", b"", b"{", b'{"a":1,"a":2}', b"NaN", b"[Infinity]", b'{"$float":"x"}', b'{"$float":{}}', b"[" * 10**6, b"1 1"],
)
def test_json_that_no_save_wrote_is_refused(data):
    """With ValueError, also for what would overflow the stack."""
    with pytest.raises(ValueError):
        strict_json.load(data)


def test_a_manifest_holds_the_sha256_and_size_of_every_other_file(scratch):
    """Compared with an independent hash of the files."""
    commit(make_manager(scratch), 1)
    directory = scratch / "checkpoints" / live_names(scratch)[0]
    found, _ = manifest.read_manifest(FileSystem(), directory)
    others = {path for path in directory.iterdir() if path.name != "MANIFEST.json"}
    assert {path.name for path in others} == set(found.files)
    for path in others:
        assert found.files[path.name].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found.files[path.name].bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", {"../model.safetensors": {"bytes": 1, "sha256": "0" * 64}, "state.json": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", {"state.json": {"bytes": -1, "sha256": "0" * 64}}),
        ("files", {"state.json": {"bytes": 1, "sha256": "0" * 63}}),
        ("files", {"state.json": {"bytes": True, "sha256": "0" * 64}}),
        ("files", {"run.py": {"bytes": 1, "sha256": "0" * 64}, "state.json": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", {}),
        ("update", -1),
        ("update", "1"),
        ("q", 10**9),
        ("shared", []),
        ("shared", {"model": 1}),
        ("health", None),
        ("surprise", 1),
    ],
)
def test_a_manifest_with_a_right_hash_and_wrong_content_is_refused(scratch, key, value):
    """The hash proves that nothing rotted, not that the writer was a friend."""
    commit(make_manager(scratch), 1)
    directory = scratch / "checkpoints" / live_names(scratch)[0]
    fields = strict_json.load((directory / "MANIFEST.json").read_bytes())
    del fields["self_sha256"]
    fields[key] = value
    fields["self_sha256"] = hashlib.sha256(strict_json.dump(fields)).hexdigest()
    (directory / "MANIFEST.json").write_bytes(strict_json.dump(fields))
    with pytest.raises(manifest.CorruptCheckpoint):
        manifest.read_manifest(FileSystem(), directory)


def test_no_pickle_and_no_torch_load_is_anywhere_in_the_package(pytestconfig):
    """Loading a checkpoint can run no code."""
    words = ("pickle", "torch" + ".load", "torch" + ".save", "eval(", "exec(")
    for path in (pytestconfig.rootpath / "resilient_t5" / "checkpoint").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in words if word in text], path


def test_a_snapshot_is_independent_and_counts_its_memory():
    """The figure that decides about the thread is the memory that is taken."""
    parts = make_parts(3)
    copy = take_snapshot(parts.tensors)
    assert same_tensors(copy, parts.tensors)
    assert snapshot_bytes(parts.tensors) == 24 + 2 + 24 + 8 + 3
    parts.tensors["model"]["shared"].zero_()
    assert copy["model"]["shared"].abs().sum() > 0
    assert copy["model"]["shared"] is copy["model"]["lm_head"]


def test_removing_a_tree_follows_no_link(tmp_path):
    """What a link points to stays."""
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "file").write_text("x")
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "link").symlink_to(tmp_path / "keep")
    remove_tree(FileSystem(), tmp_path / "tree")
    assert not (tmp_path / "tree").exists() and (tmp_path / "keep" / "file").exists()


def test_a_small_file_is_replaced_whole_and_read_within_bounds(tmp_path):
    """A stale temporary file of a dead process with the same pid does no harm."""
    fs = FileSystem()
    make_directories(fs, tmp_path / "a" / "b")
    path = tmp_path / "a" / "b" / "last.json"
    for text in (b"one", b"three"):
        replace_file(fs, path, text)
        assert read_bounded(fs, path, 5) == text
    with pytest.raises(OSError, match="at most 4"):
        read_bounded(fs, path, 4)
    assert [item.name for item in path.parent.iterdir()] == ["last.json"]


def test_a_directory_that_another_starter_creates_meanwhile_is_no_error(tmp_path):
    """Two processes may start a new run at the same moment; a file in its place is an error."""

    class Slow(FileSystem):
        def make_directory(self, path):
            path.mkdir()
            super().make_directory(path)

    make_directories(Slow(), tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        make_directories(FileSystem(), tmp_path / "file")
