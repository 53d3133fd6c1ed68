"""A GGUF file: a header with metadata and the list of tensors, then their blocks, mapped and dequantised one at a time.

The header is read here and not by `gguf.GGUFReader`, which takes 18 us for each item of a vocabulary: 2.6 s for that of
SmolLM2, against 0.12 here (one core of an AMD EPYC). What the blocks of a quantised tensor mean is the package's knowledge.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS = 1024  # are dequantised at once: beside the tensor itself there are a few MB


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in the file. `kind` is GGML's name of its type, `data` (rows, bytes of a row) its bytes, mapped."""

    kind: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    @property
    def dtype(self) -> torch.dtype | None:
        """None where it is quantised."""
        return _FLOATS.get(self.kind)

    def read(self) -> Tensor:
        """The tensor: a view of the file, or dequantised to float32."""
        if self.dtype is not None:
            return torch.from_numpy(self.data).view(self.dtype).view(self.shape)
        import gguf

        values = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        rows = values.view(len(self.data), -1).numpy()
        for i in range(0, len(rows), _ROWS):
            rows[i : i + _ROWS] = gguf.dequantize(self.data[i : i + _ROWS], gguf.GGMLQuantizationType[self.kind])
        return values


@dataclass(frozen=True)
class GGUFFile:
    """An opened file: its metadata, and its tensors by name. None of them is read yet."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def open_file(path: Path) -> GGUFFile:
    """Reads the header.

    Raises ValueError where the file is not whole, is one part of several, or holds tensors of types that cannot be
    dequantised here (all of them are named); and where the `gguf` package is not installed.
    """
    try:
        # copied on write, for PyTorch has no tensor that cannot be written; nobody writes
        data = np.memmap(path, dtype=np.uint8, mode="c")
        header = _Header(data)
        count, keys = header.start()
        metadata = dict(header.entry() for _ in range(keys))
        places = [header.tensor() for _ in range(count)]
    except (struct.error, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error
    if metadata.get("split.count", 0) > 1:
        raise ValueError(f"{path} is one of {metadata['split.count']} parts: join them with llama-gguf-split --merge")
    alignment = metadata.get("general.alignment", 32)
    blocks = data[math.ceil(header.at / alignment) * alignment :]
    return GGUFFile(path, metadata, _tensors(path, blocks, places))


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies, in bytes from the end of the header; `kind` is the number of its type."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Header:
    """Reads one value after the other, all little-endian. Raises ValueError or struct.error where there is none."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._data, self.at = data.data, 0

    def start(self) -> tuple[int, int]:
        """How many tensors and how many keys there are."""
        magic = bytes(self._data[: len(_MAGIC)])
        self.at = len(_MAGIC)
        if magic != _MAGIC:
            raise ValueError(f"it begins with {magic!r}, expected {_MAGIC!r}")
        version, count, keys = self._unpack("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"its version must be one of {_VERSIONS}, got {version}")
        return count, keys

    def entry(self) -> tuple[str, Any]:
        """A key of the metadata and its value."""
        return self._string(), self._value(*self._unpack("I"))

    def tensor(self) -> _Place:
        name = self._string()
        (dimensions,) = self._unpack("I")
        *sizes, kind, offset = self._unpack(f"{dimensions}QIQ")
        return _Place(name, tuple(reversed(sizes)), kind, offset)

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def _string(self) -> str:
        (size,) = self._unpack("Q")
        self.at += size
        if self.at > len(self._data):
            raise ValueError(f"it ends within a text of {size} bytes")
        return str(self._data[self.at - size : self.at], "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, count = self._unpack("IQ")
            if kind in _SCALARS:
                return list(self._unpack(f"{count}{_SCALARS[kind]}"))
            return [self._value(kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"it has a value of type {kind}, which is not known")
        (value,) = self._unpack(_SCALARS[kind])
        # the shortest decimal that is this float32: the 1e-05 that was meant, not 9.999999747378752e-06
        return float(str(np.float32(value))) if kind == _FLOAT32 else value


def _tensors(path: Path, blocks: NDArray[np.uint8], places: list[_Place]) -> dict[str, GGUFTensor]:
    """The tensors, whose `blocks` begin after the header."""
    tensors, unknown = {}, set()
    for place in places:
        try:
            kind, elements, size = _layout(path, place.kind)
        except NotImplementedError as error:
            unknown.add(str(error))
            continue
        *outer, columns = place.shape or (1,)
        if columns % elements:
            raise ValueError(f"{path}: {place.name} has rows of {columns}, and a block of {kind} holds {elements}")
        rows, row_bytes = math.prod(outer), columns // elements * size
        end = place.offset + rows * row_bytes
        if end > len(blocks):
            raise ValueError(f"{path} is not a whole GGUF file: {end - len(blocks)} bytes of {place.name} are missing")
        data = blocks[place.offset : end].reshape(rows, row_bytes)
        tensors[place.name] = GGUFTensor(kind, place.shape, data)
    if unknown:
        raise ValueError(f"{path} has tensors of types that are not supported: {', '.join(sorted(unknown))}")
    return tensors


def _layout(path: Path, number: int) -> tuple[str, int, int]:
    """The name of a tensor's type, and the elements and the bytes of a block. Raises NotImplementedError with its name."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ValueError(
            f'{path} is a GGUF file, and {error.name} is not installed: pip install "llama-fast[gguf]"'
        ) from error
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise NotImplementedError(f"number {number}") from None
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    if kind.name not in _FLOATS:
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            raise NotImplementedError(kind.name) from None
    return kind.name, elements, size
