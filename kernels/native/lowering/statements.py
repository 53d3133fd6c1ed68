"""Ops that act: scalar loads and stores, atomics, histograms, and what kernels print or assert."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..ttir import Op, Value
from . import memory
from .control import LEAVE
from .elements import BITS, Operand, is_float, is_pointer, llvm_type, size
from .elementwise import constant, elementwise
from .failures import text_constant
from .groups import Write, emit_group
from .index import Index
from .lanes import Lane, Uniform, Vector, as_vector, offset_pointer
from .tiles import Buffer

if TYPE_CHECKING:
    from .kernel import Kernel


def emit_scalar(k: "Kernel", op: Op) -> None:
    """Arithmetic on scalars, pointers included."""
    if op.kind in ("tt.get_program_id", "tt.get_num_programs"):
        axis = "xyz".index(op.attributes["words"][0])
        k.tiles.stored[op.result] = Uniform(f"%{'i' if op.kind == 'tt.get_program_id' else 'n'}{axis}")
        return
    lane: Lane
    if op.kind == "arith.constant":
        lane = Uniform(constant(op))
    elif op.kind == "tt.addptr":
        pointer, offset = (k.tiles.scalar(operand) for operand in op.operands)
        lane = offset_pointer(k.b, Uniform(pointer), _wide(k, offset, op.operands[1].element), op.result.element, 1)
    else:
        lane = elementwise(k.b, op, [Uniform(k.tiles.scalar(operand)) for operand in op.operands], 1)
    assert isinstance(lane, Uniform)
    k.tiles.stored[op.result] = lane


def _wide(k: "Kernel", x: Operand, element: str) -> Uniform:
    return Uniform(x if element == "i64" or not isinstance(x, str) else k.b.let(f"sext {element} {x} to i64"))


def emit_load(k: "Kernel", op: Op) -> None:
    """Of a scalar, or a volatile one, which is read where it stands; any other load of a tile is a formula."""
    volatile = bool(op.attributes.get("isVolatile"))

    def element(at: Index) -> str:
        pointer, *rest = (Uniform(k.tiles.vector(operand, at)) for operand in op.operands)
        mask, other = rest[0] if rest else None, rest[1] if len(rest) > 1 else None
        inside = k.tiles.narrow(op, pointer, mask, 1)
        lane = memory.load(k.b, pointer, op.result.element, inside, other, 1, volatile=volatile)
        if volatile:  # who waits for a flag reads after that what the flag stands for
            k.b.emit("fence acquire")
        return as_vector(k.b, lane, op.result.element, 1)

    _emit_by_element(k, op, element)


def _emit_by_element(k: "Kernel", op: Op, element: Callable[[Index], str]) -> None:
    """An op's result, a scalar or a tile that is kept, as what `element` writes for each of its elements."""
    shape = op.result.shape
    if not shape:
        k.tiles.stored[op.result] = Uniform(element(Index((), 1)))
        return
    buffer = k.buffer(op.result)

    def keep(at: Index) -> None:
        pointer = k.tiles.buffer_pointer(shape, op.result.element, buffer, at)
        memory.store(k.b, pointer, Vector(element(at)), op.result.element, None, 1)

    _each_element(k, shape, keep)
    k.tiles.stored[op.result] = Buffer(buffer)


def emit_store(k: "Kernel", op: Op) -> None:
    """Of a scalar; a tile's store is a root of a group."""
    pointer, value, *mask = (Uniform(k.tiles.scalar(operand)) for operand in op.operands)
    inside = k.tiles.narrow(op, pointer, mask[0] if mask else None, 1)
    memory.store(k.b, pointer, value, op.operands[1].element, inside, 1)


def emit_nothing(k: "Kernel", op: Op) -> None:
    """Barriers between the threads of a program, and between dependent launches: here a program is one thread."""


_ATOMICS = {"add": "add", "fadd": "fadd", "max": "max", "min": "min", "umax": "umax", "umin": "umin", "and": "and", "or": "or", "xor": "xor", "exch": "xchg"}  # fmt: skip


def emit_atomic(k: "Kernel", op: Op) -> None:
    """One element after the other, each an atomic instruction, since programs run on several threads."""

    def element(at: Index) -> str:
        pointer = k.tiles.vector(op.operands[0], at)
        masked = op.kind == "tt.atomic_rmw" and len(op.operands) > 2
        inside = k.tiles.narrow(op, Vector(pointer), k.tiles.mask(op.operands[2], at) if masked else None, 1)
        address = pointer
        if inside is not None:
            address = k.b.let(f"select i1 {as_vector(k.b, inside, 'i1', 1)}, ptr {pointer}, ptr @lf.sink")
        if op.kind == "tt.atomic_cas":
            return _compare_and_swap(k, op, address, at)
        value = op.operands[1]
        kind, x = llvm_type(value.element), k.tiles.vector(value, at)
        name = _ATOMICS[op.attributes["words"][0]]
        if (name, value.element) == ("fadd", "bf16"):
            return _add_bfloat16(k, address, x)
        return k.b.let(f"atomicrmw {name} ptr {address}, {kind} {x} seq_cst")

    _emit_by_element(k, op, element)


def _add_bfloat16(k: "Kernel", address: str, x: str) -> str:
    if not k.b.machine.has_bf16_products:
        raise NotImplementedError("tl.atomic_add of bfloat16, which this CPU does not compute with,")
    before = k.b.let(f"atomicrmw fadd ptr {address}, bfloat {k.b.let(f'bitcast i16 {x} to bfloat')} seq_cst")
    return k.b.let(f"bitcast bfloat {before} to i16")


def _compare_and_swap(k: "Kernel", op: Op, pointer: str, at: Index) -> str:
    expected, desired = (k.tiles.vector(operand, at) for operand in op.operands[1:3])
    element = op.operands[1].element
    kind, bits = llvm_type(element), f"i{BITS[element]}"
    if is_float(element):
        expected, desired = (k.b.let(f"bitcast {kind} {x} to {bits}") for x in (expected, desired))
    pair = k.b.let(f"cmpxchg ptr {pointer}, {bits} {expected}, {bits} {desired} seq_cst seq_cst")
    before = k.b.let(f"extractvalue {{ {bits}, i1 }} {pair}, 0")
    return k.b.let(f"bitcast {bits} {before} to {kind}") if is_float(element) else before


def _each_element(k: "Kernel", shape: tuple[int, ...], body: Callable[[Index], None]) -> None:
    def nest(coordinates: tuple[Lane, ...]) -> None:
        if len(coordinates) == len(shape):
            with k.b.scope():
                body(Index(coordinates, 1))
        else:
            k.b.loop(0, shape[len(coordinates)], 1, lambda i: nest((*coordinates, Uniform(i))))

    with k.b.scope():
        nest(())


def emit_histogram(k: "Kernel", op: Op) -> None:
    buffer, element = k.buffer(op.result), op.result.element
    source = op.operands[0]
    zero = Value("zero", op.result.shape, element)
    k.tiles.stored[zero] = Uniform(0)
    emit_group(k, [Write(zero, buffer)])

    def count(at: Index) -> None:
        bin_ = k.tiles.vector(source, at)
        if source.element != "i64":
            bin_ = k.b.let(f"zext {source.element} {bin_} to i64")
        inside = k.b.let(f"icmp ult i64 {bin_}, {op.result.shape[0]}")
        if len(op.operands) > 1:
            inside = k.b.let(f"and i1 {inside}, {k.tiles.vector(op.operands[1], at)}")
        place = k.b.let(f"getelementptr {element}, ptr {buffer}, i64 {bin_}")
        address = k.b.let(f"select i1 {inside}, ptr {place}, ptr @lf.sink")
        before = k.b.let(f"load {element}, ptr {address}, align {size(element)}")
        k.b.emit(f"store {element} {k.b.let(f'add {element} {before}, 1')}, ptr {address}, align {size(element)}")

    _each_element(k, source.shape, count)
    k.tiles.stored[op.result] = Buffer(buffer)


def emit_cat(k: "Kernel", op: Op) -> None:
    """Two tiles one after the other, in one buffer."""
    buffer, element = k.buffer(op.result), op.result.element
    for number, operand in enumerate(op.operands):
        start = number * operand.shape[0]
        half = k.b.let(f"getelementptr {llvm_type(element)}, ptr {buffer}, i64 {start}")
        emit_group(k, [Write(operand, half)])
    k.tiles.stored[op.result] = Buffer(buffer)


def emit_print(k: "Kernel", op: Op) -> None:
    """Lines as Triton prints them, one for each element: program, index, prefix, and which of several operands."""
    program = [("i32", f"%i{axis}") for axis in range(3)]
    prefix = op.attributes["prefix"].replace("%", "%%")
    if not op.operands:
        _print(k, f"pid (%d, %d, %d){prefix}\n", program)
    for number, operand in enumerate(op.operands):
        which = f"(operand {number}) " if len(op.operands) > 1 else ""
        is_signed = op.attributes.get("isSigned", (1,) * len(op.operands))[number]
        form, cast = _printed(operand.element, bool(op.attributes.get("hex")), bool(is_signed))

        def line(at: Index, operand: Value = operand, which: str = which, form: str = form, cast: str = cast) -> None:
            x = k.tiles.vector(operand, at)
            kind = cast.split()[-1] if cast else llvm_type(operand.element)
            if cast:
                x = k.b.let(f"{cast.split()[0]} {llvm_type(operand.element)} {x} to {kind}")
            places = [("i64", c.x) for c in at.coordinates if isinstance(c, Uniform)]
            index = ", ".join(f"%{len(str(size - 1))}ld" for size in operand.shape)
            text = f"pid (%d, %d, %d) idx ({index}){prefix}{which}{form}\n"
            _print(k, text, [*program, *places, (kind, x)])

        _each_element(k, operand.shape, line)
    k.b.call("i32", "fflush", ("ptr", "null"))


def _printed(element: str, as_hex: bool, is_signed: bool) -> tuple[str, str]:
    """How C prints an element, and what makes of it what C passes on."""
    if is_pointer(element):
        return "%p", ""
    if is_float(element):
        return "%f", "" if element == "f64" else "fpext double"
    bits = BITS[element]
    form = f"0x%0{max(bits // 4, 1)}llx" if as_hex else "%lld" if is_signed and bits > 1 else "%llu"
    return form, "" if bits == 64 else ("sext i64" if is_signed and bits > 1 and not as_hex else "zext i64")


def _print(k: "Kernel", text: str, arguments: Sequence[tuple[str, Operand]]) -> None:
    k.b.declarations["printf"] = "declare i32 @printf(ptr, ...)"
    typed = ", ".join(f"{kind} {x}" for kind, x in [("ptr", text_constant(k, text)), *arguments])
    k.b.let(f"call i32 (ptr, ...) @printf({typed})")


def emit_assert(k: "Kernel", op: Op) -> None:
    """A program whose assert fails ends there, and the launch raises."""
    message = op.attributes["message"]

    def check(at: Index) -> None:
        passed, failed = k.b.label("passed"), k.b.label("failed")
        k.b.branch_if(k.tiles.vector(op.operands[0], at), passed, failed)
        k.b.place(failed)
        k.failures.fail(op, "assert", message, 0)
        k.b.branch(LEAVE)
        k.b.place(passed)

    _each_element(k, op.operands[0].shape, check)
