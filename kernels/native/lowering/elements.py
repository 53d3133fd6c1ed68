"""Element types: their sizes, their names in LLVM, and how a Python number of each is written there.

literal(1.5, "f32") -> "0x3FF8000000000000"      (LLVM writes float as double, in hex, so that nothing is rounded)
literal(-1, "i32") -> "-1"      literal(True, "i1") -> "true"      vector_type("f16", 8) -> "<8 x half>"

bfloat16 is held as its 16 bits, an `i16`: nothing is computed in it, and where a CPU does not know it LLVM would turn every
load into calls of a library that is not there.
"""

import struct

BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_FLOATS = {"f16": "half", "bf16": "i16", "f32": "float", "f64": "double"}

Operand = str | int | float
"""What an instruction takes: an SSA name such as "%t7", or a Python number that is written as a literal."""


def is_pointer(element: str) -> bool:
    return element.startswith("ptr:")


def is_float(element: str) -> bool:
    return element in _FLOATS


def pointee(element: str) -> str:
    return element.removeprefix("ptr:")


def llvm_type(element: str) -> str:
    if is_pointer(element):
        return "ptr"
    if element not in BITS:
        raise NotImplementedError(f"an element of type {element}")
    return _FLOATS.get(element, element)


def vector_type(element: str, width: int) -> str:
    """One lane is a scalar."""
    return llvm_type(element) if width == 1 else f"<{width} x {llvm_type(element)}>"


def in_memory(element: str) -> str:
    """Booleans take a byte in memory, pointers 8."""
    return "i64" if is_pointer(element) else "i8" if element == "i1" else element


def size(element: str) -> int:
    """Bytes in memory."""
    return BITS[in_memory(element)] // 8


def wrapped(x: int, bits: int = 64) -> int:
    """The signed integer of so many bits that `x` wraps around to."""
    half = 1 << (bits - 1)
    return (x + half) % (2 * half) - half


def suffix(element: str, width: int) -> str:
    """As intrinsics are named: f32, v16f32, v8i64, p0."""
    scalar = "p0" if is_pointer(element) else "i16" if element == "bf16" else element
    return scalar if width == 1 else f"v{width}{scalar}"


def literal(x: Operand, element: str) -> str:
    if isinstance(x, str):
        return x
    if is_pointer(element):
        return "null" if x == 0 else f"inttoptr (i64 {int(x)} to ptr)"
    if not is_float(element):
        return ("true" if x else "false") if element == "i1" else str(int(x))
    x = float(x)
    if element == "f16":
        return f"0xH{int.from_bytes(struct.pack('>e', x), 'big'):04X}"
    if element == "bf16":
        return str(int.from_bytes(struct.pack(">f", x), "big", signed=True) >> 16)  # of a number that bfloat16 holds
    if element == "f32":
        x = round_to_float32(x)
    return f"0x{int.from_bytes(struct.pack('>d', x), 'big'):016X}"


def splat_literal(x: Operand, element: str, width: int) -> str:
    text = literal(x, element)
    return text if width == 1 else "<" + ", ".join([f"{llvm_type(element)} {text}"] * width) + ">"


def round_to_float32(x: float) -> float:
    try:
        return float(struct.unpack("f", struct.pack("f", x))[0])
    except OverflowError:
        return float("inf") if x > 0 else float("-inf")


def from_bits(bits: int, element: str) -> float:
    """The number whose bits are given: how TTIR writes infinities and NaN."""
    if element == "bf16":
        bits, element = bits << 16, "f32"
    integer, floating = {"f16": ("H", "e"), "f32": ("I", "f"), "f64": ("Q", "d")}[element]
    return float(struct.unpack(floating, struct.pack(integer, bits))[0])
