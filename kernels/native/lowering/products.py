"""Matrix products: `tl.dot` as register tiles.

    %c = tt.dot %a, %b, %acc : [M, K] x [K, N]

Along K, where both operands are contiguous in it (x @ weight.T): vectors along K, a tile of rows by columns of accumulators,
added across their lanes at the end. bfloat16 takes `vdpbf16ps` where the CPU has it: 32 products an instruction.

    acc[i][j] = fma(a[i, k..k+15], b[k..k+15, j], acc[i][j])           4 x 4 accumulators

Along N otherwise: vectors along N, elements of a in every lane.

    acc[i][j] = fma(a[i, k] in all lanes, b[k, j..j+15], acc[i][j])    6 rows x 4 vectors

Rows, columns and K beyond an operand's prefix masks hold zeros and are not computed: 2 rows of a tile of 16 cost 2. This is
the only place where a multiplication and an addition are fused.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ttir import Op, Value
from .builder import Builder
from .elements import BITS, Operand, is_float, splat_literal, suffix, vector_type
from .elementwise import constant, convert_float
from .groups import Write, emit_group
from .lanes import Affine, Lane, Uniform, as_vector
from .tiles import Buffer, Index, Masks

if TYPE_CHECKING:
    from .kernel import Kernel

PREFETCH = 1024  # bytes ahead of the rows that are streamed: 0.62 -> 1.0 of oneDNN's speed at 4 rows


@dataclass(frozen=True, slots=True)
class _Product:
    """A product and where its result, which holds the accumulator before, lies."""

    a: Value
    b: Value
    result: Value
    buffer: str
    lead: tuple[Lane, ...]  # of a batch of products

    @property
    def m(self) -> int:
        return self.a.shape[-2]

    @property
    def n(self) -> int:
        return self.b.shape[-1]

    @property
    def k(self) -> int:
        return self.a.shape[-1]


def emit_dot(k: "Kernel", op: Op) -> None:
    a, b, accumulator = op.operands
    result = op.result
    buffer = _accumulates_in_place(k, op) or k.buffer(result)
    if k.tiles.stored.get(accumulator) != Buffer(buffer):
        emit_group(k, [Write(accumulator, buffer)])
    k.tiles.stored[result] = Buffer(buffer)
    with k.b.scope():
        if len(result.shape) == 2:
            _emit_product(k, _Product(a, b, result, buffer, ()))
        else:
            k.b.loop(0, result.shape[0], 1, lambda i: _emit_product(k, _Product(a, b, result, buffer, (Uniform(i),))))


def _accumulates_in_place(k: "Kernel", op: Op) -> str | None:
    """The buffer of the carried value that this product's result becomes, if nothing else needs its old value."""
    from .control import buffers_read

    if (
        not k.frames
        or k.frames[-1].op.kind != "scf.for"
        or len(op.result.uses) != 1
        or op.parent is not k.frames[-1].op
    ):
        return None
    frame = k.frames[-1]
    (body,) = frame.op.regions[0]
    yielded = body.ops[-1]
    if op.result.uses[0] is not yielded:
        return None
    position = yielded.operands.index(op.result)
    slot, carried = frame.slots[position], body.arguments[position + 1]
    reads = buffers_read(k, op.operands[2])
    others = {other.pointer for other in frame.slots if other is not slot}
    if slot.initial is not None or reads.get(slot.pointer) or others & set(reads):
        return None
    if any(slot.pointer in buffers_read(k, operand) for operand in op.operands[:2]):
        return None  # the accumulator is written before the operands are read
    return slot.pointer if k.consumers(carried) <= {op} else None


def _emit_product(k: "Kernel", product: _Product) -> None:
    lead = len(product.lead)
    rows = _prefix_bound(k, product.a, lead, product.m)
    columns = _prefix_bound(k, product.b, lead + 1, product.n)
    inner = k.b.min(
        _prefix_bound(k, product.a, lead + 1, product.k),
        _prefix_bound(k, product.b, lead, product.k),
    )
    exact = _mask_is_its_bounds(k, product.a), _mask_is_its_bounds(k, product.b)
    along_k = _contiguous(k, product.a, product.lead, 1) and _contiguous(k, product.b, product.lead, 0)
    if along_k and is_float(product.a.element):
        _AlongK(k, product, inner, exact).emit(rows, columns)
    else:
        _AlongN(k, product, inner, (exact[0], exact[1] and columns == product.n)).emit(rows)


def _mask_is_its_bounds(k: "Kernel", value: Value) -> bool:
    """Whether an operand is simply loaded, and within its bounds no mask is to be tested."""
    found = _loaded(k, value)
    if found is None or len(found[0].operands) < 2:
        return found is not None
    _, mask, *other = found[0].operands
    with k.b.trial():
        return (not other or _is_zero(other[0])) and k.tiles.is_its_bounds(mask)


def _loaded(k: "Kernel", value: Value) -> tuple[Op, list[int]] | None:
    """The load behind an operand, through transposes, with the dimension of it that each dimension of the operand is."""
    dimensions = list(range(len(value.shape)))
    while value not in k.tiles.stored and value.op is not None and not value.is_argument:
        if value.op.kind == "tt.load":
            return value.op, dimensions
        if value.op.kind != "tt.trans":
            return None
        order = value.op.attributes["order"]
        dimensions = [order[dimension] for dimension in dimensions]
        value = value.op.operands[0]
    return None


def _prefix_bound(k: "Kernel", value: Value, dimension: int, size: int) -> Operand:
    """How many indices of a dimension an operand has before there are only zeros."""
    found = _loaded(k, value)
    if found is None or len(found[0].operands) < 2:
        return size
    load, dimensions = found
    _, mask, *other = load.operands
    if other and not _is_zero(other[0]):
        return size
    bound = k.tiles.bound(mask, dimensions[dimension])
    return size if bound is None else k.b.clamp(bound, 0, size)


def _is_zero(value: Value) -> bool:
    return (
        value.op is not None and not value.is_argument and value.op.kind == "arith.constant" and constant(value.op) == 0
    )


def _contiguous(k: "Kernel", value: Value, lead: tuple[Lane, ...], dimension: int) -> bool:
    """Whether neighbours along a dimension lie beside one another in memory."""
    coordinates: list[Lane] = [Uniform(0)] * 2
    coordinates[dimension] = Affine(0, 1)
    at = Index((*(Uniform(0) for _ in lead), *coordinates), 1)
    found = _loaded(k, value)
    with k.b.trial():
        if found is None:
            source, where = value, at
            while source not in k.tiles.stored and source.op is not None and source.op.kind == "tt.trans":
                (source, moved) = k.tiles.sources(source.op, source, where)[0]
                where = where.moved(moved)
            linear = k.tiles.linear(source.shape, where.coordinates, 1)
            return isinstance(linear, Affine) and linear.stride == 1
        load, dimensions = found
        places = [at.coordinates[dimensions.index(d)] for d in range(len(dimensions))]
        lane = k.tiles.lanes(load.operands[0], Index(tuple(places), 1))
    return isinstance(lane, Affine) and lane.stride == 1


class _AlongK:
    def __init__(self, k: "Kernel", product: _Product, inner: Operand, exact: tuple[bool, bool]) -> None:
        self.kernel, self.b, self.product, self.inner, self.exact = k, k.b, product, inner, exact
        self.element = product.result.element  # of the accumulators
        self.pairs = product.a.element == "bf16" and k.b.machine.has_bf16_products and product.k >= 2 * k.b.lanes
        lanes = k.b.lanes if self.element == "f32" else k.b.lanes // 2
        self.width = 2 * lanes if self.pairs else min(lanes, product.k)
        self.lanes = lanes if self.pairs else self.width
        self.kind = vector_type(self.element, self.lanes)
        self.tile = (4, 4) if k.b.machine.vector_registers >= 32 else (2, 4)

    def emit(self, rows: Operand, columns: Operand) -> None:
        tall, wide = self.tile
        self.b.blocks(
            0, rows, (tall, 1),
            lambda m, height: self.b.blocks(0, columns, (wide, 2, 1), lambda n, breadth: self.emit_tile(m, n, height, breadth)),
        )  # fmt: skip

    def emit_tile(self, m: Operand, n: Operand, height: int, breadth: int) -> None:
        b, zero = self.b, splat_literal(0.0, self.element, self.lanes)
        rows = [Uniform(b.add(m, i)) for i in range(height)]
        columns = [Uniform(b.add(n, j)) for j in range(breadth)]
        with b.scope():
            sums = [[b.alloca(self.kind, "sum") for _ in columns] for _ in rows]
            for slots in sums:
                for slot in slots:
                    b.emit(f"store {self.kind} {zero}, ptr {slot}")
            full = b.round_down(self.inner, self.width)
            b.loop(0, full, self.width, lambda i: self.step(rows, columns, sums, i, Masks.INSIDE))
            end = b.min(b.round_down(b.add(self.inner, self.width - 1), self.width), self.product.k)
            b.loop(full, end, self.width, lambda i: self.step(rows, columns, sums, i, Masks.TEST))
            totals = sums_of_lanes(
                b,
                [b.let(f"load {self.kind}, ptr {slot}") for slots in sums for slot in slots],
                self.element,
                self.lanes,
            )
            for number, row in enumerate(rows):
                self.add_to_result(row, columns[0], totals, number, height, breadth)

    def step(
        self, rows: list[Uniform], columns: list[Uniform], sums: list[list[str]], i: Operand, masks: Masks
    ) -> None:
        """Adds `width` products to each accumulator."""
        b, product = self.b, self.product
        with b.scope():
            along = Affine(i, 1) if self.width > 1 else Uniform(i)
            left_masks, right_masks = (
                Masks.TRUE if exact and masks is Masks.INSIDE else Masks.TEST for exact in self.exact
            )
            lefts = [Index((*product.lead, row, along), self.width, left_masks) for row in rows]
            rights = [Index((*product.lead, along, column), self.width, right_masks) for column in columns]
            if masks is Masks.INSIDE:
                self.prefetch(rows, i)
            left = [self.operand(product.a, at) for at in lefts]
            right = [self.operand(product.b, at) for at in rights]
            for x, slots in zip(left, sums, strict=True):
                for y, slot in zip(right, slots, strict=True):
                    before = b.let(f"load {self.kind}, ptr {slot}")
                    b.emit(f"store {self.kind} {self.multiply_add(x, y, before)}, ptr {slot}")

    def operand(self, value: Value, at: Index) -> str:
        x = self.kernel.tiles.vector(value, at)
        return x if self.pairs else convert_float(self.b, x, value.element, self.element, self.width)

    def multiply_add(self, x: str, y: str, before: str) -> str:
        if self.pairs:
            pairs = f"<{self.width} x bfloat>"
            x, y = (self.b.let(f"bitcast {vector_type('bf16', self.width)} {operand} to {pairs}") for operand in (x, y))
            name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}"
            return self.b.call(self.kind, name, (self.kind, before), (pairs, x), (pairs, y))
        return multiply_add(self.kernel, x, y, before, self.element, self.lanes)

    def prefetch(self, rows: list[Uniform], i: Operand) -> None:
        """The rows of the first operand, where it is streamed from memory."""
        found = _loaded(self.kernel, self.product.a)
        if found is None or found[1] != sorted(found[1]):
            return
        for row in rows:
            at = Index((*self.product.lead, row, Affine(i, 1)), self.width)
            pointer = self.kernel.tiles.lanes(found[0].operands[0], at)
            if isinstance(pointer, Affine):
                ahead = self.b.let(f"getelementptr i8, ptr {pointer.base}, i64 {PREFETCH}")
                self.b.call("void", "llvm.prefetch.p0", ("ptr", ahead), ("i32", 0), ("i32", 3), ("i32", 1))

    def add_to_result(self, row: Uniform, column: Uniform, totals: str, number: int, height: int, breadth: int) -> None:
        """Adds the sums of row `number` of the tile, which stand side by side in `totals` as they do in the result."""
        b, kind = self.b, vector_type(self.element, breadth)
        at = Index((*self.product.lead, row, column), 1)
        pointer = self.kernel.tiles.buffer_pointer(self.product.result.shape, self.element, self.product.buffer, at)
        assert isinstance(pointer, Uniform)
        all_sums = vector_type(self.element, height * breadth)
        if height == 1:
            sums = totals
        elif breadth == 1:
            sums = b.let(f"extractelement {all_sums} {totals}, i64 {number}")
        else:
            sums = b.shuffle(totals, "poison", all_sums, list(range(number * breadth, (number + 1) * breadth)))
        before = b.let(f"load {kind}, ptr {pointer.x}, align 4")
        b.emit(f"store {kind} {b.let(f'fadd {kind} {before}, {sums}')}, ptr {pointer.x}, align 4")


def sums_of_lanes(b: Builder, vectors: list[str], element: str, width: int) -> str:
    """The sum of each vector's lanes, all side by side in one vector (a scalar for one); their number is a power of two.

    Two vectors are halved together, [a.low, b.low] + [a.high, b.high], so that every addition works on full vectors: 45
    instructions for 16 vectors of 16 lanes, where one after the other they take 224. The order of additions is the same.
    """
    group, lanes = width, width  # lanes that are still to be added up; lanes of a vector
    while group > 1:
        half, kind = group // 2, vector_type(element, lanes)
        pairs = (
            [(vectors[i], vectors[i + 1]) for i in range(0, len(vectors), 2)]
            if len(vectors) > 1
            else [(vectors[0], "poison")]
        )
        span = range(0, 2 * lanes if len(vectors) > 1 else lanes, group)
        low = [start + lane for start in span for lane in range(half)]
        vectors, lanes = [], len(low)
        for left, right in pairs:
            if lanes == 1:
                parts = [b.let(f"extractelement {kind} {left}, i64 {lane}") for lane in (0, 1)]
            else:
                parts = [b.shuffle(left, right, kind, low), b.shuffle(left, right, kind, [lane + half for lane in low])]
            vectors.append(b.let(f"fadd {vector_type(element, lanes)} {parts[0]}, {parts[1]}"))
        group = half
    while len(vectors) > 1:  # there were more vectors than lanes
        kind, order = vector_type(element, lanes), list(range(2 * lanes))
        vectors = [b.shuffle(vectors[i], vectors[i + 1], kind, order) for i in range(0, len(vectors), 2)]
        lanes *= 2
    return vectors[0]


class _AlongN:
    def __init__(self, k: "Kernel", product: _Product, inner: Operand, exact: tuple[bool, bool]) -> None:
        self.kernel, self.b, self.product, self.inner, self.exact = k, k.b, product, inner, exact
        self.element = product.result.element
        lanes = max(1, k.b.machine.vector_bytes * 8 // BITS[self.element])
        self.width = min(lanes, product.n)
        self.kind = vector_type(self.element, self.width)
        many = k.b.machine.vector_registers >= 32
        self.vectors = min(4 if many else 2, product.n // self.width)
        self.height = (6 if self.vectors > 2 else 8) if many else (4 if self.vectors > 1 else 6)

    def emit(self, rows: Operand) -> None:
        columns = self.vectors * self.width
        self.b.loop(
            0, self.product.n, columns,
            lambda n: self.b.blocks(0, rows, (self.height, 2, 1), lambda m, height: self.emit_tile(m, n, height)),
        )  # fmt: skip

    def emit_tile(self, m: Operand, n: Operand, height: int) -> None:
        b = self.b
        with b.scope():
            rows = [Uniform(b.add(m, i)) for i in range(height)]
            columns: list[Lane] = [
                Affine(b.add(n, j * self.width), 1) if self.width > 1 else Uniform(b.add(n, j))
                for j in range(self.vectors)
            ]
            zero = splat_literal(0.0 if is_float(self.element) else 0, self.element, self.width)
            slots = [b.alloca(self.kind, "sum") for _ in range(height * len(columns))]
            for slot in slots:
                b.emit(f"store {self.kind} {zero}, ptr {slot}")
            b.loop(0, self.inner, 1, lambda i: self.step(rows, columns, slots, i))
            for number, slot in enumerate(slots):
                self.add_to_result(rows[number // len(columns)], columns[number % len(columns)], slot)

    def add_to_result(self, row: Uniform, column: Lane, slot: str) -> None:
        """One addition a tile to what was there: sums over K stay short, which halves their error at K = 1024 and more."""
        b, product = self.b, self.product
        at = Index((*product.lead, row, column), self.width)
        lane = self.kernel.tiles.buffer_pointer(product.result.shape, self.element, product.buffer, at)
        place = as_vector(b, lane, f"ptr:{self.element}", 1)
        before, total = (b.let(f"load {self.kind}, ptr {pointer}, align 4") for pointer in (place, slot))
        add = "fadd" if is_float(self.element) else "add"
        b.emit(f"store {self.kind} {b.let(f'{add} {self.kind} {before}, {total}')}, ptr {place}, align 4")

    def step(self, rows: list[Uniform], columns: list[Lane], slots: list[str], i: Operand) -> None:
        b, product, tiles = self.b, self.product, self.kernel.tiles
        with b.scope():
            right = []
            for column in columns:
                x = tiles.vector(product.b, Index((*product.lead, Uniform(i), column), self.width, self.masks(1)))
                right.append(self.convert(x, product.b.element, self.width))
            for r, row in enumerate(rows):
                x = tiles.vector(product.a, Index((*product.lead, row, Uniform(i)), 1, self.masks(0)))
                scalar = self.convert(x, product.a.element, 1)
                left = b.splat(scalar, self.element, self.width)
                for y, slot in zip(right, slots[r * len(columns) :], strict=False):
                    before = b.let(f"load {self.kind}, ptr {slot}")
                    after = multiply_add(self.kernel, left, y, before, self.element, self.width)
                    b.emit(f"store {self.kind} {after}, ptr {slot}")

    def masks(self, operand: int) -> Masks:
        return Masks.TRUE if self.exact[operand] else Masks.TEST

    def convert(self, x: str, element: str, width: int) -> str:
        if is_float(element):
            return convert_float(self.b, x, element, self.element, width)
        return self.b.let(f"sext {vector_type(element, width)} {x} to {vector_type(self.element, width)}")


def multiply_add(k: "Kernel", x: str, y: str, z: str, element: str, width: int) -> str:
    kind = vector_type(element, width)
    if is_float(element):
        return k.b.call(kind, f"llvm.fma.{suffix(element, width)}", (kind, x), (kind, y), (kind, z))
    return k.b.let(f"add {kind} {z}, {k.b.let(f'mul {kind} {x}, {y}')}")
