"""Loads and stores of lanes: plain, masked, strided or gathered, by what is known of the addresses.

pointer Uniform                         one scalar load, in every lane
pointer Affine, stride 1                load <16 x float>                    contiguous
  with a mask                           llvm.masked.load                     only where Prefix or Vector masks remain
  into a large tensor                   store ..., !nontemporal              around the caches: else a line is read to be overwritten
pointer Affine, another stride          llvm.masked.gather
pointer Vector                          llvm.masked.gather / scatter
"""

from .builder import Builder
from .elements import Operand, in_memory, is_pointer, literal, llvm_type, size, splat_literal, suffix, vector_type
from .lanes import Affine, Lane, Prefix, Uniform, Vector, as_vector

Mask = Prefix | Vector | Uniform | None
"""None where every lane is inside."""


def load(
    b: Builder, pointer: Lane, element: str, mask: Mask, other: Lane | None, width: int, *, volatile: bool = False
) -> Lane:
    """What lies at `pointer`; where the mask is false `other`, or zero. Only uniform ones can be volatile."""
    stored = in_memory(element)
    if stored != element:
        passed_on = _to_memory(b, other, element, width)
        return _from_memory(b, load(b, pointer, stored, mask, passed_on, width, volatile=volatile), element, width)
    instruction = "load volatile" if volatile else "load"
    if mask is None and isinstance(pointer, Uniform):
        return Uniform(b.let(f"{instruction} {llvm_type(element)}, ptr {pointer.x}, align {size(element)}"))
    if isinstance(pointer, Uniform) and isinstance(mask, Uniform):
        return _load_if(b, pointer.x, element, mask.x, other, width, instruction)
    if width == 1:
        address = as_vector(b, pointer, f"ptr:{element}", 1)
        if mask is None:
            return Vector(b.let(f"load {llvm_type(element)}, ptr {address}, align {size(element)}"))
        lane = _load_if(b, address, element, as_vector(b, mask, "i1", 1), other, 1)
        return Vector(as_vector(b, lane, element, 1))
    kind, flags = vector_type(element, width), vector_type("i1", width)
    if mask is None and isinstance(pointer, Affine) and pointer.stride == 1:
        return Vector(b.let(f"load {kind}, ptr {pointer.base}, align {size(element)}"))
    inside = splat_literal(True, "i1", width) if mask is None else as_vector(b, mask, "i1", width)
    passed = "zeroinitializer" if other is None else as_vector(b, other, element, width)
    if isinstance(pointer, Affine) and pointer.stride == 1:
        name = f"llvm.masked.load.{suffix(element, width)}.p0"
        return Vector(_masked(b, kind, name, ("ptr", pointer.base), size(element), (flags, inside), (kind, passed)))
    addresses, pointers = as_vector(b, pointer, f"ptr:{element}", width), f"<{width} x ptr>"
    name = f"llvm.masked.gather.{suffix(element, width)}.v{width}p0"
    return Vector(_masked(b, kind, name, (pointers, addresses), size(element), (flags, inside), (kind, passed)))


def store(
    b: Builder, pointer: Lane, value: Lane, element: str, mask: Mask, width: int, *, streams: bool = False
) -> None:
    """Writes the lanes inside the mask. What `streams` goes around the caches, where it is a whole vector that lies as one must."""
    stored = in_memory(element)
    if stored != element:
        lane = _to_memory(b, value, element, width)
        assert lane is not None
        return store(b, pointer, lane, stored, mask, width, streams=streams)
    kind, flags = vector_type(element, width), vector_type("i1", width)
    x = as_vector(b, value, element, width)
    if width == 1:
        address: Operand = as_vector(b, pointer, f"ptr:{element}", 1)
        if mask is not None:
            address = b.let(f"select i1 {as_vector(b, mask, 'i1', 1)}, ptr {address}, ptr @lf.sink")
        return b.emit(f"store {kind} {x}, ptr {address}, align {size(element)}")
    if mask is None and isinstance(pointer, Affine) and pointer.stride == 1:
        instruction = f"store {kind} {x}, ptr {pointer.base}"
        if streams:
            return _store_around_caches(b, pointer.base, instruction, width * size(element), size(element))
        return b.emit(f"{instruction}, align {size(element)}")
    inside = splat_literal(True, "i1", width) if mask is None else as_vector(b, mask, "i1", width)
    if isinstance(pointer, Affine) and pointer.stride == 1:
        name = f"llvm.masked.store.{suffix(element, width)}.p0"
        inside = inside if element in ("f16", "f32", "f64", "i64") else _unknown(b, inside, width)
        _masked(b, "void", name, (kind, x), ("ptr", pointer.base), size(element), (flags, inside))
        return None
    addresses, pointers = as_vector(b, pointer, f"ptr:{element}", width), f"<{width} x ptr>"
    name = f"llvm.masked.scatter.{suffix(element, width)}.v{width}p0"
    _masked(b, "void", name, (kind, x), (pointers, addresses), size(element), (flags, inside))
    return None


def _store_around_caches(b: Builder, pointer: Operand, instruction: str, vector: int, element: int) -> None:
    """x86 has such stores for aligned vectors alone: whether this one is, a branch asks, the same way all along a row."""
    b.definitions["nontemporal"] = "!0 = !{i32 1}"
    aligned, other, done = (b.label(hint) for hint in ("aligned", "other", "stored"))
    low = b.let(f"and i64 {b.let(f'ptrtoint ptr {pointer} to i64')}, {vector - 1}")
    b.branch_if(b.let(f"icmp eq i64 {low}, 0"), aligned, other)
    b.place(aligned)
    b.emit(f"{instruction}, align {vector}, !nontemporal !0")
    b.branch(done)
    b.place(other)
    b.emit(f"{instruction}, align {element}")
    b.branch(done)
    b.place(done)


def _unknown(b: Builder, mask: str, width: int) -> str:
    """The mask, as one that LLVM does not know when it compiles.

    Of integers that are cut from wider ones, under a mask known to be true in a single lane, LLVM 22 stores the wide one.
    """
    zero = b.let("load volatile i8, ptr @lf.zeros")
    true = b.splat(b.let(f"icmp eq i8 {zero}, 0"), "i1", width)
    return b.let(f"and {vector_type('i1', width)} {mask}, {true}")


def _masked(b: Builder, result: str, name: str, *arguments: tuple[str, Operand] | int) -> str:
    """A masked intrinsic; a number among the arguments is the alignment, which must be written as a literal."""
    typed = [("i32", argument) if isinstance(argument, int) else argument for argument in arguments]
    return b.call(result, name, *typed)


def _load_if(
    b: Builder, pointer: Operand, element: str, condition: Operand, other: Lane | None, width: int, load: str = "load"
) -> Lane:
    """A scalar that is read only if the condition holds: from a word of zeros otherwise, without a branch."""
    kind, inside = llvm_type(element), literal(condition, "i1")
    address = b.let(f"select i1 {inside}, ptr {pointer}, ptr @lf.zeros")
    x = b.let(f"{load} {kind}, ptr {address}, align {size(element)}")
    if other is None:
        return Uniform(x)
    if isinstance(other, Uniform) or width == 1:
        passed = literal(other.x, element) if isinstance(other, Uniform) else as_vector(b, other, element, 1)
        return Uniform(b.let(f"select i1 {inside}, {kind} {x}, {kind} {passed}"))
    lanes = vector_type(element, width)
    return Vector(
        b.let(
            f"select i1 {inside}, {lanes} {b.splat(x, element, width)}, {lanes} {as_vector(b, other, element, width)}"
        )
    )


def _from_memory(b: Builder, lane: Lane, element: str, width: int) -> Lane:
    """A byte as a boolean, 64 bits as a pointer."""
    lanes = 1 if isinstance(lane, Uniform) else width
    x, stored = as_vector(b, lane, in_memory(element), lanes), vector_type(in_memory(element), lanes)
    if is_pointer(element):
        result = b.let(f"inttoptr {stored} {x} to {vector_type(element, lanes)}")
    else:
        result = b.let(f"icmp ne {stored} {x}, {splat_literal(0, in_memory(element), lanes)}")
    return Uniform(result) if isinstance(lane, Uniform) else Vector(result)


def _to_memory(b: Builder, lane: Lane | None, element: str, width: int) -> Lane | None:
    if lane is None:
        return None
    if isinstance(lane, Uniform) and not isinstance(lane.x, str):
        return Uniform(int(lane.x))
    lanes = 1 if isinstance(lane, Uniform) else width
    cast = "ptrtoint" if is_pointer(element) else "zext"
    x = b.let(
        f"{cast} {vector_type(element, lanes)} {as_vector(b, lane, element, lanes)} to {vector_type(in_memory(element), lanes)}"
    )
    return Uniform(x) if isinstance(lane, Uniform) else Vector(x)
