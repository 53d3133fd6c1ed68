"""Names for `perf`: a profile of native kernels shows `rms_norm_kernel.work` and not a bare address.

    LLAMA_FAST_PERF=1 perf record python -m llama_fast ... && perf report

`perf` reads /tmp/perf-PID.map, one function a line: address, size, name.
"""

import os
import struct
from collections.abc import Iterator

from .llvmlite_compat import llvm

_SYMBOL = struct.Struct("<IBBHQQ")  # ELF64: name, type and binding, visibility, section, value, size
_FUNCTION = 2


def write_map(image: bytes, symbol: str, address: int) -> None:
    """Adds the functions of an object whose `symbol` was loaded at `address`."""
    found = list(functions(image))
    start = address - next(value for name, value, _ in found if name == symbol)
    with open(f"/tmp/perf-{os.getpid()}.map", "a") as file:
        file.writelines(f"{start + value:x} {size:x} {name}\n" for name, value, size in found)


def functions(image: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, offset in the code and size of every function of an ELF object."""
    sections = {section.name(): section.data() for section in llvm().ObjectFileRef.from_data(image).sections()}
    names = sections[b".strtab"]
    for name, kind, _, _, value, size in _SYMBOL.iter_unpack(sections[b".symtab"]):
        if kind & 15 == _FUNCTION:
            yield names[name : names.index(0, name)].decode(), value, size
