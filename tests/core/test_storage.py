import json
import os
import struct
import sys

import pytest
import torch

from taylor_attention.core import storage
from taylor_attention.core.storage import read_tensors, write_tensors, write_text
from taylor_attention.errors import ArgumentError, MissingDependencyError, StorageError

METADATA = {"note": "two words", "step": "7"}
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
]


def content():
    return {"b": torch.randn(3, 4), "a": torch.arange(5), "none": torch.empty(0, 2)}


@pytest.fixture
def path(tmp_path):
    """A file of kind "test" in a folder of its own."""
    path = tmp_path / "file.safetensors"
    write_tensors(path, content(), kind="test", metadata=METADATA)
    return path


def parts(blob):
    """Header and data of a safetensors file."""
    size = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8 : 8 + size]), blob[8 + size :]


def assemble(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# ---- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    tensor = (torch.randn(4, 3, 2) * 100).abs().to(dtype).transpose(0, 2)  # not contiguous
    write_tensors(tmp_path / "file", {"x": tensor}, kind="test", metadata=METADATA)
    tensors, metadata = read_tensors(tmp_path / "file", kind="test")
    assert (tensors["x"].dtype, tensors["x"].shape) == (dtype, tensor.shape)
    assert torch.equal(tensors["x"], tensor)
    assert metadata == METADATA


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.empty(0, 2),
        torch.tensor(3.5),
        torch.ones(2).requires_grad_(),
    ],
    ids=["not finite", "empty", "scalar", "with gradient"],
)
def test_unusual_tensors_come_back(tmp_path, tensor):
    write_tensors(tmp_path / "file", {"x": tensor}, kind="test", metadata={})
    found = read_tensors(tmp_path / "file", kind="test")[0]["x"]
    assert found.shape == tensor.shape
    assert torch.equal(found.reshape(-1).view(torch.int32), tensor.detach().reshape(-1).view(torch.int32))


def test_tensors_that_share_memory_come_back(tmp_path):
    x = torch.randn(4, 4)
    write_tensors(tmp_path / "file", {"whole": x, "part": x[1:3], "same": x}, kind="test", metadata={})
    found, _ = read_tensors(tmp_path / "file", kind="test")
    assert [torch.equal(found[name], y) for name, y in {"whole": x, "part": x[1:3], "same": x}.items()] == [True] * 3


def test_writing_replaces_and_leaves_nothing_beside(path):
    write_tensors(str(path), {"x": torch.ones(2)}, kind="test", metadata={})
    tensors, metadata = read_tensors(str(path), kind="test")
    assert (list(tensors), metadata) == (["x"], {})
    assert os.listdir(path.parent) == [path.name]


def test_metadata_may_not_take_the_names_of_the_header(path):
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match="^metadata: expected names other than "):
        write_tensors(path, {}, kind="test", metadata={"kind": "model"})
    assert path.read_bytes() == before


# ---- files that cannot be trusted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused(path, share):
    blob = path.read_bytes()
    path.write_bytes(blob[: int(share * len(blob))])
    with pytest.raises(StorageError, match=f"^{path}: not a whole safetensors file"):
        read_tensors(path, kind="test")


@pytest.mark.parametrize("bit", [0, 6])
@pytest.mark.parametrize("place", range(48))
def test_a_file_with_one_bit_flipped_is_refused(path, place, bit):
    """Wherever it is: in the length, in the header, in the data."""
    blob = bytearray(path.read_bytes())
    blob[place * (len(blob) - 1) // 47] ^= 1 << bit
    path.write_bytes(blob)
    with pytest.raises(StorageError, match=f"^{path}: "):
        read_tensors(path, kind="test")


@pytest.mark.parametrize("change", ["note", "step", "new"])
def test_altered_metadata_is_refused(path, change):
    header, data = parts(path.read_bytes())
    header["__metadata__"][change] = "altered"
    path.write_bytes(assemble(header, data))
    with pytest.raises(StorageError, match="the content does not match its digest; the file was altered or damaged"):
        read_tensors(path, kind="test")


def test_renamed_tensors_are_refused(path):
    header, data = parts(path.read_bytes())
    header["c"] = header.pop("b")
    path.write_bytes(assemble(header, data))
    with pytest.raises(StorageError, match="the content does not match its digest"):
        read_tensors(path, kind="test")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("version", "0", f"expected version '{storage.LAYOUT_VERSION}', got '0'"),
        ("version", "2", f"expected version '{storage.LAYOUT_VERSION}', got '2'"),
        ("kind", "model", "expected kind 'test', got 'model'"),
        ("format", "pt", "expected format 'taylor-attention', got 'pt'"),
    ],
)
def test_another_version_kind_or_format_is_refused(path, name, value, message):
    header, data = parts(path.read_bytes())
    header["__metadata__"][name] = value
    path.write_bytes(assemble(header, data))
    with pytest.raises(StorageError, match=f"^{path}: {message}$"):
        read_tensors(path, kind="test")


def test_a_file_of_another_kind_is_refused(path):
    with pytest.raises(StorageError, match=f"^{path}: expected kind 'state', got 'test'$"):
        read_tensors(path, kind="state")


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(StorageError, match="expected format 'taylor-attention', got None"):
        read_tensors(tmp_path / "foreign", kind="test")


@pytest.mark.parametrize("blob", [b"", b"hello\n" * 100, b"\xff" * 64, struct.pack("<Q", 2) + b"[]"], ids=repr)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, blob):
    (tmp_path / "file").write_bytes(blob)
    with pytest.raises(StorageError, match="not a whole safetensors file"):
        read_tensors(tmp_path / "file", kind="test")


def test_a_pickle_is_never_loaded(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "file")
    with pytest.raises(StorageError, match="not a whole safetensors file"):
        read_tensors(tmp_path / "file", kind="test")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing", "No such file"), (".", "Is a directory"), ("file.safetensors/below", "Not a directory")],
)
def test_what_cannot_be_read_is_one_clear_line(path, name, reason):
    with pytest.raises(StorageError, match=rf"^[^\n]*: cannot be read \({reason}[^\n]*\)$"):
        read_tensors(path.parent / name, kind="test")


# ---- writes that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [("no folder/file", "No such file"), ("file.safetensors/below", "Not a directory"), ("folder", "Is a directory")],
)
def test_where_nothing_can_be_written_nothing_changes(path, name, reason):
    (path.parent / "folder").mkdir()
    before = path.read_bytes()
    with pytest.raises(StorageError, match=rf"^[^\n]*: cannot be written \({reason}[^\n]*\)$"):
        write_tensors(path.parent / name, content(), kind="test", metadata={})
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == ["file.safetensors", "folder"]


FAILURES = {"a full disk": OSError(28, "No space left on device"), "Ctrl-C": KeyboardInterrupt()}


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(
    "write",
    [lambda path: write_tensors(path, content(), kind="test", metadata={}), lambda path: write_text(path, "new")],
    ids=["tensors", "text"],
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch, step, failure, write):
    def fail(*_):
        raise FAILURES[failure]

    before = path.read_bytes()
    monkeypatch.setattr(os, step, fail)
    with pytest.raises((StorageError, KeyboardInterrupt)) as caught:
        write(path)
    assert isinstance(caught.value, KeyboardInterrupt if failure == "Ctrl-C" else StorageError)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_new_file_is_on_the_disk_before_it_takes_the_place(path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), replace(*names)))
    write_tensors(path, content(), kind="test", metadata={})
    assert order[:2] == ["fsync", "replace"]


def test_text_is_replaced_whole(tmp_path):
    write_text(tmp_path / "text", "old and longer")
    write_text(tmp_path / "text", "σ = 1\n")
    assert (tmp_path / "text").read_bytes() == "σ = 1\n".encode()
    assert os.listdir(tmp_path) == ["text"]


# ---- the optional dependency -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "purpose"),
    [
        (lambda path: read_tensors(path, kind="test"), "reading tensors from a file"),
        (lambda path: write_tensors(path, {}, kind="test", metadata={}), "writing tensors to a file"),
    ],
    ids=["read", "write"],
)
def test_without_safetensors_one_sentence_says_what_to_install(path, monkeypatch, call, purpose):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    before = path.read_bytes()
    with pytest.raises(MissingDependencyError) as caught:
        call(path)
    assert str(caught.value) == f"{purpose} needs safetensors: pip install 'taylor-attention[io]'"
    assert path.read_bytes() == before
