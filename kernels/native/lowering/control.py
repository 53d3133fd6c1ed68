"""Loops and branches of a kernel, and what they carry.

    %acc = scf.for %i = %lo to %hi step %s iter_args(%sum = %zero, %p = %first) {     sum: a buffer, filled with zero before
      ...                                                                             the loop and written anew at the yield
      %next = tt.addptr %p, %step          all elements move by the same: `p` is its first value and an offset, so that it
      scf.yield %new, %next                stays affine, and loads through it contiguous
    }

Scalars are kept in slots, of which LLVM makes registers. A yield writes buffers in an order in which none is overwritten
before another value has read it; where there is none (a swap), through a copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ttir import Op, Value
from . import memory
from .elements import Operand, is_float, literal, llvm_type, vector_type
from .groups import Write, emit_group
from .index import Index
from .lanes import Uniform, as_affine
from .reductions import combine
from .tiles import Advanced, Buffer
from .views import MOVES, VIEWS

if TYPE_CHECKING:
    from .kernel import Kernel


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a carried value lies: a scalar's memory, a tile's buffer, or the offset of a tile that only moves."""

    value: Value  # what has the slot's type
    pointer: str
    initial: Value | None = None  # of a tile that only moves


@dataclass(frozen=True, slots=True)
class Frame:
    """A region that is being written: where what it yields goes."""

    op: Op
    slots: list[Slot]


def new_slot(k: "Kernel", value: Value) -> Slot:
    return Slot(value, k.buffer(value) if value.shape else k.b.alloca(llvm_type(value.element)))


def read_slot(k: "Kernel", slot: Slot, value: Value) -> None:
    """Makes `value` what the slot holds from here on."""
    if slot.initial is not None:
        k.tiles.stored[value] = Advanced(slot.initial, k.b.let(f"load i64, ptr {slot.pointer}"))
    elif value.shape:
        k.tiles.stored[value] = Buffer(slot.pointer)
    else:
        k.tiles.stored[value] = Uniform(k.b.let(f"load {llvm_type(value.element)}, ptr {slot.pointer}"))


def assign(k: "Kernel", slots: list[Slot], values: list[Value]) -> None:
    """Writes all values into their slots, as if at once."""
    scalars = [
        (slot, value, k.tiles.scalar(value)) for slot, value in zip(slots, values, strict=True) if not value.shape
    ]
    moved = [
        (slot, _step(k, slot, value)) for slot, value in zip(slots, values, strict=True) if slot.initial is not None
    ]
    tiles = [
        Write(value, slot.pointer)
        for slot, value in zip(slots, values, strict=True)
        if value.shape and slot.initial is None and k.tiles.stored.get(value) != Buffer(slot.pointer)
    ]
    for group in _in_order(k, tiles):
        emit_group(k, list(group))
    for slot, value, x in scalars:
        k.b.emit(f"store {llvm_type(value.element)} {literal(x, value.element)}, ptr {slot.pointer}")
    for slot, step in moved:
        offset = k.b.let(f"load i64, ptr {slot.pointer}")
        k.b.emit(f"store i64 {k.b.add(offset, step)}, ptr {slot.pointer}")


def independent_writes(k: "Kernel", op: Op) -> Iterator[Write]:
    """Of what a region yields the tiles whose old values no other yielded tile reads: they may be written before the rest."""
    slots = k.frames[-1].slots
    yields = [(slot, value) for slot, value in zip(slots, op.operands, strict=True) if value.shape]
    reads = [buffers_read(k, value) for _, value in yields]
    for number, (slot, value) in enumerate(yields):
        made = value.op
        if slot.initial is not None or made is None or value.is_argument or value in k.tiles.stored:
            continue
        if made.ancestors != op.ancestors:  # made before the region, and perhaps read where nothing is in the slot
            continue
        others = reads[:number] + reads[number + 1 :]
        if not reads[number].get(slot.pointer) and not any(slot.pointer in other for other in others):
            yield Write(value, slot.pointer)


def _in_order(k: "Kernel", writes: list[Write]) -> Iterator[list[Write]]:
    """Groups of one shape in an order in which no buffer is written that a later write reads."""
    reads = {write: buffers_read(k, write.value) for write in writes}
    copies: list[Write] = []
    for write in writes:
        if reads[write].get(write.buffer):  # its own buffer, at other places: a transposed copy of itself
            yield [Write(write.value, temporary := k.buffer(write.value))]
            copies.append(Write(_buffered(k, write.value, temporary), write.buffer))
    waiting = [write for write in writes if not reads[write].get(write.buffer)]
    group: list[Write] = []
    while waiting:
        free = [
            write
            for write in waiting
            if not any(write.buffer in reads[other] for other in waiting if other is not write)
        ]
        if not free:
            write = waiting.pop()
            if group:
                yield group
                group = []
            yield [Write(write.value, temporary := k.buffer(write.value))]
            copies.append(Write(_buffered(k, write.value, temporary), write.buffer))
            continue
        waiting.remove(free[0])
        if group and (group[0].shape != free[0].shape or any(reads[each].get(free[0].buffer) for each in group)):
            yield group  # also where one of it reads, at other places, what is to be written next
            group = []
        group.append(free[0])
    if group:
        yield group
    for copy in copies:
        yield [copy]


def _buffered(k: "Kernel", like: Value, buffer: str) -> Value:
    value = Value(like.name, like.shape, like.element)
    k.tiles.stored[value] = Buffer(buffer)
    return value


def buffers_read(k: "Kernel", value: Value) -> dict[str, bool]:
    """Buffers that the formula of `value` reads, with whether at other places than the one that is computed."""
    found: dict[str, bool] = {}

    def visit(current: Value, moved: bool, seen: set[tuple[Value, bool]]) -> None:
        if (current, moved) in seen:
            return
        seen.add((current, moved))
        stored = k.tiles.stored.get(current)
        if isinstance(stored, Buffer):
            found[stored.pointer] = found.get(stored.pointer, False) or moved
        elif isinstance(stored, Advanced):
            visit(stored.initial, moved, seen)
        elif stored is None and current.op is not None and current.shape:
            for operand in current.op.operands:
                visit(operand, moved or current.op.kind in MOVES, seen)

    visit(value, False, set())
    return found


# -- tiles that only move


def _uniform_step(carried: Value, yielded: Value) -> Value | None:
    """The operand that is added to `carried` to give `yielded`, if it is the same in every element."""
    op = yielded.op
    if op is None or yielded.is_argument or op.kind not in ("arith.addi", "tt.addptr") or is_float(carried.element):
        return None
    if carried not in op.operands:
        return None
    step = op.operands[1] if op.operands[0] is carried else op.operands[0]
    source = step
    while source.op is not None and not source.is_argument and source.op.kind in VIEWS - {"tt.splat", "tt.join"}:
        source = source.op.operands[0]
    is_uniform = source.op is not None and not source.is_argument and source.op.kind in ("tt.splat", "arith.constant")
    return step if is_uniform and step is not carried else None


def _step(k: "Kernel", slot: Slot, yielded: Value) -> Operand:
    step = _uniform_step(slot.value, yielded)
    assert step is not None
    lane = k.tiles.lanes(step, Index(tuple(Uniform(0) for _ in step.shape), 1))
    affine = as_affine(k.b, lane, step.element)
    assert affine is not None
    return affine.base


def _loop_slot(k: "Kernel", carried: Value, initial: Value, yielded: Value) -> Slot:
    """The slot of a value that a for loop carries, holding the initial value."""
    if carried.shape and _uniform_step(carried, yielded) is not None and _is_address(k, initial):
        offset = k.b.alloca("i64")
        k.b.emit(f"store i64 0, ptr {offset}")
        return Slot(carried, offset, initial)
    slot = new_slot(k, carried)
    assign(k, [slot], [initial])
    return slot


def _is_address(k: "Kernel", value: Value) -> bool:
    """Whether a tile's formula loads nothing, so that it may be computed again at any later time."""
    at = Index(tuple(Uniform(0) for _ in value.shape), 1)
    with k.b.trial():
        reads = [op for op, _, _ in k.tiles.reads(value, at) if op.kind == "tt.load"]
    return not reads and not buffers_read(k, value)


# -- the ops


@contextmanager
def _region(k: "Kernel", op: Op, slots: list[Slot]) -> Iterator[None]:
    k.frames.append(Frame(op, slots))
    with k.b.scope():
        yield
    k.frames.pop()


def emit_for(k: "Kernel", op: Op) -> None:
    (body,) = op.regions[0]
    index, *carried = body.arguments
    integer = llvm_type(index.element)
    low, high, step = (literal(k.tiles.scalar(value), index.element) for value in op.operands[:3])
    yielded = body.ops[-1].operands if carried else []
    slots = [_loop_slot(k, *values) for values in zip(carried, op.operands[3:], yielded, strict=True)]
    counter = k.b.alloca(integer, "i")
    k.b.emit(f"store {integer} {low}, ptr {counter}")
    head, inside, done = (k.b.label(hint) for hint in ("for", "do", "done"))
    k.b.branch(head)
    k.b.place(head)
    i = k.b.let(f"load {integer}, ptr {counter}", "i")
    less = "ult" if op.attributes["unsigned"] else "slt"
    k.b.branch_if(k.b.let(f"icmp {less} {integer} {i}, {high}"), inside, done)
    k.b.place(inside)
    with _region(k, op, slots):
        k.tiles.stored[index] = Uniform(i)
        for slot, value in zip(slots, carried, strict=True):
            read_slot(k, slot, value)
        k.block(body)
    k.b.emit(f"store {integer} {k.b.let(f'add {integer} {i}, {step}')}, ptr {counter}")
    k.b.branch(head)
    k.b.place(done)
    for slot, result in zip(slots, op.results, strict=True):
        read_slot(k, slot, result)


def emit_while(k: "Kernel", op: Op) -> None:
    """`before` computes the condition, `after` the body; what the condition passes on are the loop's results."""
    (before,), (after,) = op.regions
    slots = [new_slot(k, value) for value in before.arguments]
    assign(k, slots, op.operands)
    passed = [new_slot(k, value) for value in after.arguments]
    head, inside, done = (k.b.label(hint) for hint in ("while", "do", "done"))
    k.b.branch(head)
    k.b.place(head)
    with _region(k, op, passed):
        for slot, value in zip(slots, before.arguments, strict=True):
            read_slot(k, slot, value)
        k.block(before)  # ends in scf.condition
        condition = k.tiles.scalar(before.ops[-1].operands[0])
        k.b.branch_if(condition, inside, done)
        k.b.place(inside)
    with _region(k, op, slots):
        for slot, value in zip(passed, after.arguments, strict=True):
            read_slot(k, slot, value)
        k.block(after)
    k.b.branch(head)
    k.b.place(done)
    for slot, result in zip(passed, op.results, strict=True):
        read_slot(k, slot, result)


def emit_if(k: "Kernel", op: Op) -> None:
    slots = [new_slot(k, result) for result in op.results]
    then, otherwise, done = (k.b.label(hint) for hint in ("then", "else", "endif"))
    k.b.branch_if(k.tiles.scalar(op.operands[0]), then, otherwise)
    for label, blocks in zip((then, otherwise), [*op.regions, []][:2], strict=True):
        k.b.place(label)
        with _region(k, op, slots):
            for block in blocks:
                k.block(block)
        k.b.branch(done)
    k.b.place(done)
    for slot, result in zip(slots, op.results, strict=True):
        read_slot(k, slot, result)


def emit_yield(k: "Kernel", op: Op) -> None:
    assign(k, k.frames[-1].slots, op.operands)


def emit_condition(k: "Kernel", op: Op) -> None:
    assign(k, k.frames[-1].slots, op.operands[1:])


def emit_branch(k: "Kernel", op: Op) -> None:
    """Between a kernel's own blocks: an early return."""
    if len(op.operands) > (op.kind == "cf.cond_br"):
        raise NotImplementedError("a branch that passes values on, as of nested returns,")
    if op.kind == "cf.cond_br":
        then, otherwise = op.attributes["labels"]
        k.b.branch_if(k.tiles.scalar(op.operands[0]), f"block.{then}", f"block.{otherwise}")
    else:
        (label,) = op.attributes["labels"]
        k.b.branch(f"block.{label}")


LEAVE = "leave"  # the label of the block that ends a program


def emit_return(k: "Kernel", op: Op) -> None:
    k.b.branch(LEAVE)


# -- a scan: one element after the other


def emit_scan(k: "Kernel", op: Op) -> None:
    """`tl.cumsum` and the like: along the axis one element after the other, all other elements for themselves."""
    shape, axis = op.operands[0].shape, op.attributes["axis"]
    elements = [operand.element for operand in op.operands]
    buffers = [k.buffer(result) for result in op.results]
    slots = [k.b.alloca(vector_type(element, 1)) for element in elements]

    def nest(dimensions: list[int], fixed: dict[int, Operand]) -> None:
        if dimensions:
            dimension, *rest = dimensions
            return k.b.loop(0, shape[dimension], 1, lambda i: nest(rest, {**fixed, dimension: i}))

        def step(j: Operand, first: bool) -> None:
            place = k.b.sub(shape[axis] - 1, j) if op.attributes["reverse"] else j
            coordinates = tuple(Uniform({**fixed, axis: place}[dimension]) for dimension in range(len(shape)))
            at = Index(coordinates, 1)
            values = [k.tiles.vector(operand, at) for operand in op.operands]
            if not first:
                before = [
                    k.b.let(f"load {llvm_type(element)}, ptr {slot}")
                    for element, slot in zip(elements, slots, strict=True)
                ]
                values = combine(k, op, before, values, 1)
            for value, element, slot, buffer, result in zip(values, elements, slots, buffers, op.results, strict=True):
                k.b.emit(f"store {llvm_type(element)} {value}, ptr {slot}")
                pointer = k.tiles.buffer_pointer(shape, result.element, buffer, at)
                memory.store(k.b, pointer, Uniform(value), element, None, 1)

        with k.b.scope():
            step(0, True)
            return k.b.loop(1, shape[axis], 1, lambda j: step(j, False))

    with k.b.scope():
        nest([dimension for dimension in range(len(shape)) if dimension != axis], {})
    for result, buffer in zip(op.results, buffers, strict=True):
        k.tiles.stored[result] = Buffer(buffer)
