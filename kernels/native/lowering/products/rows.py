"""Products whose operands both lie along K, as in x @ weight.T: vectors along K, added across their lanes at the end.

    acc[i][j] = fma(a[i, k..k+15], b[k..k+15, j], acc[i][j])           4 x 4 accumulators

bfloat16 takes `vdpbf16ps` where the CPU has it: 32 products an instruction.
"""

from typing import TYPE_CHECKING

from ...ttir import Value
from ..builder import Builder
from ..elements import Operand, size, splat_literal, vector_type
from ..elementwise import convert_float
from ..index import Index, Masks
from ..lanes import Affine, Lane, Uniform
from .arithmetic import add_pairs, multiply_add
from .operands import Product, loaded

if TYPE_CHECKING:
    from ..kernel import Kernel

# Rows that are read from memory are asked for a tile ahead, in the order of memory, into the second-level cache, which the CPU's own
# prefetching goes on with: in huge pages a core of an AMD EPYC read 19 to 22 GB/s so for 8 columns, and 8 to 11 asking for each row apart.
LINE = 64  # bytes that memory gives at once
PREFETCH = 1024  # bytes ahead, of rows too long for one tile
LONG_ROW = 16 * 1024  # bytes in a tile, of a row that may go on after it
# Up to four columns are multiplied two at a time by eight rows: 22 to 32 GB/s, by four rows and four columns 20 to 26. One or two
# by one short row, in the order of memory: 28 to 38 GB/s. With more columns a row would be multiplied from cache too often.
FEW_COLUMNS = 4
SHORT_ROW = 4 * 1024

_FIRST_LEVEL, _SECOND_LEVEL = 3, 2  # of the cache, as `llvm.prefetch` has them


class AlongK:
    """`start` and `inner` bound K, `exact` says which operands need no mask tested within their bounds."""

    def __init__(
        self, k: "Kernel", product: Product, inner: Operand, exact: tuple[bool, bool], start: Operand = 0
    ) -> None:
        self.kernel, self.b, self.product, self.inner, self.exact, self.start = k, k.b, product, inner, exact, start
        self.element = product.result.element  # of the accumulators
        self.pairs = product.a.element == "bf16" and k.b.machine.has_bf16_products and product.k >= 2 * k.b.lanes
        lanes = k.b.lanes if self.element == "f32" else k.b.lanes // 2
        self.width = 2 * lanes if self.pairs else min(lanes, product.k)
        self.lanes = lanes if self.pairs else self.width
        self.kind = vector_type(self.element, self.lanes)
        self.tile = (4, 4) if k.b.machine.vector_registers >= 32 else (2, 4)
        streamed = self.streamed()
        if streamed is not None and streamed[1] == 1 and product.n <= FEW_COLUMNS:
            in_order = product.n <= 2 and product.k * size(streamed[0].element) <= SHORT_ROW
            self.tile = (1 if in_order else 2 * self.tile[0], 2)

    def emit(self, rows: Operand, columns: Operand, first_row: Operand = 0) -> None:
        tall, wide = self.tile
        self.b.blocks(
            first_row, rows, tuple(height for height in (8, 4, 2, 1) if height <= tall),
            lambda m, height: self.b.blocks(
                0, columns, tuple(breadth for breadth in (4, 2, 1) if breadth <= wide),
                lambda n, breadth: self.emit_tile(m, n, height, breadth),
            ),
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
            b.loop(self.start, full, self.width, lambda i: self.step(rows, columns, sums, i, Masks.INSIDE))
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
                self.prefetch(rows, columns, i)
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
            return add_pairs(self.b, x, y, before, self.lanes)
        return multiply_add(self.b, x, y, before, self.element, self.lanes)

    def streamed(self) -> tuple[Value, int] | None:
        """The operand that is read from memory: the first that is loaded where the product stands; and its dimension of K."""
        op = self.product.result.op
        assert op is not None
        for value, along in ((self.product.a, 1), (self.product.b, 0)):
            found = loaded(self.kernel, value)
            if found is not None and found[0].ancestors == op.ancestors:
                return value, along
        return None

    def prefetch(self, rows: list[Uniform], columns: list[Uniform], i: Operand) -> None:
        """What is streamed, beyond element `i` of the tile's rows or columns."""
        match self.streamed():
            case value, 1 if self.product.k * size(value.element) <= LONG_ROW:
                # rows mostly lie one behind the other: then the next tile begins where this one ends
                start = self.address(value, Uniform(self.b.add(rows[0].x, len(rows))), Uniform(0))
                of_column = size(value.element) * len(rows)
                passed = self.b.mul(i, of_column)
                for line in range(0, of_column * self.width, LINE):
                    self.emit_prefetch(start, self.b.add(passed, line), _SECOND_LEVEL)
            case value, 1:
                for row in rows:
                    self.emit_prefetch(self.address(value, row, Uniform(i)), PREFETCH, _FIRST_LEVEL)
            case value, _:
                for column in columns:
                    after = Uniform(self.b.add(column.x, len(columns)))
                    self.emit_prefetch(self.address(value, Uniform(i), after), 0, _FIRST_LEVEL)

    def address(self, value: Value, *at: Lane) -> Operand | None:
        """Where an element of an operand is loaded from; None where that is not simply computed."""
        from ..control import buffers_read

        found = loaded(self.kernel, value)
        assert found is not None
        load, dimensions = found
        coordinates = (*self.product.lead, *at)
        index = Index(tuple(coordinates[dimensions.index(d)] for d in range(len(dimensions))), 1)
        # What is ahead may lie beyond the tile. An address that is itself loaded (a block table) is read under its mask.
        tables = [op for op, _, _ in self.kernel.tiles.reads(load.operands[0], index) if op.kind == "tt.load"]
        if any(len(table.operands) < 2 for table in tables) or buffers_read(self.kernel, load.operands[0]):
            return None
        pointer = self.kernel.tiles.lanes(load.operands[0], index)
        return pointer.x if isinstance(pointer, Uniform) else None

    def emit_prefetch(self, start: Operand | None, distance: Operand, level: int) -> None:
        if start is not None:
            ahead = self.b.let(f"getelementptr i8, ptr {start}, i64 {distance}")
            self.b.call("void", "llvm.prefetch.p0", ("ptr", ahead), ("i32", 0), ("i32", level), ("i32", 1))

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
