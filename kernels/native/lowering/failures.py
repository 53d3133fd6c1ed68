"""What ends a launch with an error: asserts, and where bounds are checked, accesses outside a tensor's memory.

A kernel that can fail has more slots behind those of its arguments. The first points at a record, zero before the launch, which
the first failure claims and fills; with bounds checking two follow for each pointer argument, where the memory of its tensor
begins and ends:

    { i64 claimed, ptr text, i64 address, i32 i0, i32 i1, i32 i2 }      RECORD, in Python's struct format

`text` lies in the kernel's machine code and has lines: "assert" or "index", the kernel and the place in its source, and the
assert's message or the names of the arguments that the pointer may come from.

    add_kernel, add.py:12: element 1000 is outside the memory of x, which has 1000 elements (program (3, 0, 0))
"""

import struct
from typing import TYPE_CHECKING

from ..ttir import Function, Op, Value
from . import memory
from .analysis import origins
from .elements import Operand, is_pointer, pointee, size, vector_type
from .lanes import Lane, Prefix, Uniform, Vector, as_vector

if TYPE_CHECKING:
    from .kernel import Kernel

RECORD = struct.Struct("<QQqiii4x")

_FAIL = """
define internal void @lf.fail(ptr %record, ptr %text, i64 %address, i32 %i0, i32 %i1, i32 %i2) noinline cold {
  %claim = cmpxchg ptr %record, i64 0, i64 1 seq_cst seq_cst
  %first = extractvalue { i64, i1 } %claim, 1
  br i1 %first, label %write, label %done
write:
  %fields = getelementptr { i64, ptr, i64, i32, i32, i32 }, ptr %record, i64 0, i32 1
  store ptr %text, ptr %fields
  %p_address = getelementptr i8, ptr %record, i64 16
  store i64 %address, ptr %p_address
  %p_i0 = getelementptr i8, ptr %record, i64 24
  store i32 %i0, ptr %p_i0
  %p_i1 = getelementptr i8, ptr %record, i64 28
  store i32 %i1, ptr %p_i1
  %p_i2 = getelementptr i8, ptr %record, i64 32
  store i32 %i2, ptr %p_i2
  br label %done
done:
  ret void
}"""


def can_fail(function: Function, check_bounds: bool) -> bool:
    """Whether the kernel has a record to fill."""
    return check_bounds or any(op.kind == "tt.assert" for op in function.ops())


class Failures:
    """Writes what fails in a kernel."""

    def __init__(self, k: "Kernel") -> None:
        self.k, self.b = k, k.b

    def load_slots(self) -> list[str]:
        """Loads what lies behind the arguments' slots, at the program's start."""
        arguments = self.k.function.arguments
        names = ["failures"]
        for number, argument in enumerate(arguments):
            if self.k.check_bounds and is_pointer(argument.element):
                names += [f"begin{number}", f"end{number}"]
        lines = []
        for slot, name in enumerate(names, start=len(arguments)):
            lines.append(f"  %{name}_slot = getelementptr i64, ptr %arguments, i64 {slot}")
            lines.append(f"  %{name} = load {'ptr' if slot == len(arguments) else 'i64'}, ptr %{name}_slot, align 8")
        return lines

    def fail(self, op: Op, kind: str, detail: str, address: Operand) -> None:
        """Claims the record."""
        text = text_constant(self.k, f"{kind}\n{self.k.function.name}, {op.location}\n{detail}")
        self.b.definitions["lf.fail"] = _FAIL
        program = ", ".join(f"i32 %i{axis}" for axis in range(3))
        self.b.emit(f"call void @lf.fail(ptr %failures, ptr {text}, i64 {address}, {program})")

    def narrow(self, op: Op, pointer: Lane, mask: memory.Mask, width: int) -> memory.Mask:
        """The lanes of a load, store or atomic that lie inside the memory of its argument; records one that does not."""
        arguments = origins(op.operands[0])
        if not arguments:
            return mask
        lanes = 1 if isinstance(pointer, Uniform) and not isinstance(mask, Prefix | Vector) else width
        b, flags, kind = self.b, vector_type("i1", lanes), vector_type("i64", lanes)
        element = op.operands[0].element
        pointers = vector_type(element, lanes)
        address = b.let(f"ptrtoint {pointers} {as_vector(b, pointer, element, lanes)} to {kind}")
        inside = self.inside(arguments, address, size(pointee(element)), lanes)
        active = None if mask is None else as_vector(b, mask, "i1", lanes)
        outside = b.let(f"xor {flags} {inside}, {as_vector(b, Uniform(True), 'i1', lanes)}")
        if active is not None:
            outside = b.let(f"and {flags} {outside}, {active}")
            inside = b.let(f"and {flags} {inside}, {active}")
        self.report(op, arguments, address, outside, lanes)
        return Uniform(inside) if isinstance(pointer, Uniform) and lanes == 1 else Vector(inside)

    def inside(self, arguments: list[Value], address: str, bytes_: int, lanes: int) -> str:
        b, flags, kind = self.b, vector_type("i1", lanes), vector_type("i64", lanes)
        found = ""
        for argument in arguments:
            number = self.k.function.arguments.index(argument)
            last = b.let(f"sub i64 %end{number}, {bytes_}")
            above = b.let(f"icmp sge {kind} {address}, {b.splat(f'%begin{number}', 'i64', lanes)}")
            below = b.let(f"icmp sle {kind} {address}, {b.splat(last, 'i64', lanes)}")
            both = b.let(f"and {flags} {above}, {below}")
            found = b.let(f"or {flags} {found}, {both}") if found else both
        return found

    def report(self, op: Op, arguments: list[Value], address: str, outside: str, lanes: int) -> None:
        """Records the first lane outside, if there is one."""
        b = self.b
        flags, kind = vector_type("i1", lanes), vector_type("i64", lanes)
        some = outside if lanes == 1 else b.call("i1", f"llvm.vector.reduce.or.v{lanes}i1", (flags, outside))
        failed, passed = b.label("outside"), b.label("checked")
        b.branch_if(some, failed, passed)
        b.place(failed)
        if lanes > 1:
            bits = b.let(f"bitcast {flags} {outside} to i{lanes}")
            first = b.call(f"i{lanes}", f"llvm.cttz.i{lanes}", (f"i{lanes}", bits), ("i1", "true"))
            address = b.let(f"extractelement {kind} {address}, i{lanes} {first}")
        self.fail(op, "index", " or ".join(argument.name for argument in arguments), address)
        b.branch(passed)
        b.place(passed)


def text_constant(k: "Kernel", text: str) -> str:
    """The name of a C string."""
    data = text.encode() + b"\0"
    name = f"@lf.text.{len(k.b.definitions)}"
    written = "".join(chr(c) if 32 <= c < 127 and c not in b'"\\' else f"\\{c:02X}" for c in data)
    k.b.definitions[name] = f'{name} = private constant [{len(data)} x i8] c"{written}"'
    return name
