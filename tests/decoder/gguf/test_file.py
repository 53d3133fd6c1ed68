"""The format: what is in a file, and files that are broken."""

import builtins
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from llama_fast.decoder.gguf.file import open_file
from tests.decoder.gguf.files import close
from tests.parity import not_interpreted

pytestmark = not_interpreted

VALUES = {
    "uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 4_000_000_000, "int32": -7, "uint64": 1 << 60,
    "int64": -(1 << 40), "float32": 0.5, "float64": 1e-300, "bool": True, "string": "Grüße, 世界",
}  # fmt: skip
ARRAYS = {"strings": ["a", "", "▁é"], "ints": [1, -2, 3], "floats": [0.25, -1.5], "bools": [True, False]}


def write(path, *tensors, **metadata):
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_key_value(key, value, GGUFValueType.get_type(value))
    for i, tensor in enumerate(tensors):
        writer.add_tensor(f"tensor {i}", tensor)
    close(writer)
    return path


def test_what_the_gguf_package_reads(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(64)
    for kind, value in VALUES.items():
        getattr(writer, f"add_{kind}")(f"one {kind}", value)
    for kind, values in ARRAYS.items():
        writer.add_array(f"many {kind}", values)
    writer.add_tensor("odd", np.arange(5, dtype=np.float16))
    writer.add_tensor("second", np.arange(6, dtype=np.float32).reshape(3, 2))
    close(writer)
    file, reader = open_file(tmp_path / "a.gguf"), GGUFReader(tmp_path / "a.gguf")
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata == theirs and file.metadata["one string"] == VALUES["string"]
    assert torch.equal(file.tensors["odd"].read(), torch.arange(5).half())
    assert torch.equal(file.tensors["second"].read(), torch.arange(6.0).view(3, 2))


def test_a_float_is_the_decimal_that_was_meant(tmp_path):
    assert open_file(write(tmp_path / "a.gguf", eps=1e-5, base=500000.0)).metadata["eps"] == 1e-5


def test_a_large_tensor_is_dequantised_in_pieces(tmp_path, monkeypatch):
    """So there are a few MB beside it; the last piece is short."""
    data = gguf.quantize(np.random.default_rng(0).standard_normal((2500, 32), np.float32), GGMLQuantizationType.Q8_0)
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=GGMLQuantizationType.Q8_0)
    close(writer)
    tensor = open_file(tmp_path / "a.gguf").tensors["w"]
    assert tensor.dtype is None and tensor.shape == (2500, 32)
    expected, pieces, dequantize = gguf.dequantize(data, GGMLQuantizationType.Q8_0), [], gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda rows, kind: pieces.append(len(rows)) or dequantize(rows, kind))
    assert torch.equal(tensor.read(), torch.from_numpy(expected))
    assert max(pieces) < 2500 and sum(pieces) == 2500
    with torch.device("meta"):  # of whoever reads it
        assert tensor.read().device.type == "cpu"


def test_what_is_not_quantised_is_not_copied(tmp_path):
    tensor = open_file(write(tmp_path / "a.gguf", np.ones((4, 8), np.float32))).tensors["tensor 0"]
    assert tensor.read().data_ptr() == tensor.data.ctypes.data


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("size", [0, 3, 10, 30, 150, -1])
def test_a_file_that_is_cut(size, tmp_path):
    path = write(tmp_path / "a.gguf", np.ones((4, 8), np.float32), words=["one", "two"], number=7)
    cut(path, size)
    with pytest.raises(ValueError, match=r"a\.gguf is not a whole GGUF file"):
        open_file(path)


def changed(path, at, value):
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "it begins with b'GGML'"),
        (4, struct.pack("<I", 1), "its version must be one of"),
        (4, struct.pack(">I", 3), "its version must be one of"),
        (24, struct.pack("<Q", 1 << 62), "it ends within a text"),
    ],
)
def test_what_is_no_gguf_file(at, value, message, tmp_path):
    path = write(tmp_path / "a.gguf", np.ones((4, 8), np.float32))
    changed(path, at, value)
    with pytest.raises(ValueError, match=message):
        open_file(path)


def test_types_of_tensors_that_are_not_supported_are_named(tmp_path):
    path = write(tmp_path / "a.gguf", np.ones((4, 8), np.int8), np.ones((4, 8), np.float32), np.ones(8, np.int32))
    with pytest.raises(ValueError, match="types that are not supported: I32, I8"):
        open_file(path)
    kind = path.read_bytes().index(struct.pack("<I", GGMLQuantizationType.I8), path.read_bytes().index(b"tensor 0"))
    changed(path, kind, struct.pack("<I", 250))
    with pytest.raises(ValueError, match="types that are not supported: I32, number 250"):
        open_file(path)


def test_one_of_several_files(tmp_path):
    with pytest.raises(ValueError, match="is one of 3 parts: join them with llama-gguf-split --merge"):
        open_file(write(tmp_path / "a-00001-of-00003.gguf", **{"split.count": 3}))


def test_without_the_package(tmp_path, monkeypatch):
    path = write(tmp_path / "a.gguf", np.ones((4, 8), np.float32))
    real = builtins.__import__

    def without_gguf(name, *arguments, **options):
        if name == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(ValueError, match=r'gguf is not installed: pip install "llama-fast\[gguf\]"'):
        open_file(path)
