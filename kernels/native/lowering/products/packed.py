"""Products of larger tiles: the right operand is packed first, into words of 32 bits that lie as they are multiplied.

    float32     word (k, n)  is  b[k, n]
    bfloat16    word (k, n)  is  b[2 k, n] and b[2 k + 1, n], which `vdpbf16ps` multiplies and adds, where the CPU has it

Where b lies along N the words of a row are loaded side by side; where it lies along K (the keys of an attention) a square
of them is loaded along K and transposed in registers, log2(16) = 4 rounds of interleaving for 16 x 16. Each word is then used for
every row of a. Row by row a lies in memory too, where it was computed or loaded before the loop around the product.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...ttir import Value
from ..builder import Builder
from ..elements import Operand, splat_literal, vector_type
from ..elementwise import convert_float
from ..index import Coordinates, Index
from ..lanes import Affine, Lane, Uniform, Vector
from ..memory import store
from ..tiles import Buffer
from .arithmetic import add_pairs
from .columns import AlongN
from .operands import Product, is_contiguous, is_zero, prefix_bound, takes_pairs

if TYPE_CHECKING:
    from ..kernel import Kernel


class Panels:
    """The operands in memory, in words of `along` elements along K.

    `left` lies row by row; `right` in strips of as many columns as a vector has lanes at most, each row by row of words.
    """

    def __init__(self, k: "Kernel", product: Product) -> None:
        self.kernel, self.b, self.product = k, k.b, product
        op = product.result.op
        assert op is not None
        self.along = 2 if takes_pairs(op, k.b.machine) else 1
        self.element = "bf16" if self.along == 2 else "f32"
        self.strip = min(k.b.lanes, product.n)

    def left(self, rows: Operand, inner: Operand) -> str:
        """Of its rows and of K so much is needed at least."""
        k, b, product = self.kernel, self.b, self.product
        stored = k.tiles.stored.get(product.a)
        if isinstance(stored, Buffer) and product.a.element == self.element:
            return stored.pointer
        words = product.k // self.along
        panel = k.panel("left", product.m * words)
        width = min(b.lanes, words)
        needed = self.words_of(inner, width)
        if is_contiguous(k, product.a, (), 0) and words >= b.lanes:
            b.loop(
                0, b.round_up(rows, b.lanes), b.lanes,
                lambda m: b.loop(0, needed, b.lanes, lambda i: self.transpose_rows(panel, m, i)),
            )  # fmt: skip
            return panel

        def copy(row: Operand, i: Operand) -> None:
            with b.scope():
                x = self.words_along_k(product.a, lambda along: (Uniform(row), along), i, width)
                self.store(panel, b.add(b.mul(row, words), i), x, width)

        b.loop(0, rows, 1, lambda m: b.loop(0, needed, width, lambda i: copy(m, i)))
        return panel

    def words_of(self, inner: Operand, multiple: int) -> Operand:
        """The words that hold so many elements along K, and up to a multiple."""
        b = self.b
        return b.round_up(b.div(b.add(inner, self.along - 1), self.along), multiple)

    def transpose_rows(self, panel: str, m: Operand, i: Operand) -> None:
        """A square of words of `a`, which lies along M."""
        b, product = self.b, self.product
        with b.scope():
            columns = [
                self.words_across_k(product.a, lambda k: (Affine(m, 1), Uniform(k)), b.add(i, j), b.lanes)
                for j in range(b.lanes)
            ]
            for j, row in enumerate(transposed(b, columns, self.word, b.lanes)):
                number = b.add(b.mul(b.add(m, j), product.k // self.along), i)
                self.store(panel, number, row, b.lanes)

    def right(self, inner: Operand) -> str:
        """Of K, `inner` is needed at least."""
        b, product, strip = self.b, self.product, self.strip
        words = product.k // self.along
        panel = self.kernel.panel("right", words * product.n)
        width = min(b.lanes, words)
        needed = self.words_of(inner, width)
        if is_contiguous(self.kernel, product.b, (), 0):
            b.loop(
                0, product.n, strip, lambda n: b.loop(0, needed, width, lambda i: self.transpose(panel, n, i, width))
            )
        else:
            few = product.n <= 8 * strip
            b.loop(
                0, needed, 1, lambda i: b.loop(0, product.n, strip, lambda n: self.interleave(panel, n, i), unroll=few)
            )
        return panel

    def transpose(self, panel: str, n: Operand, i: Operand, width: int) -> None:
        """`width` words along K of a strip's columns, as that many rows of words."""
        b, product = self.b, self.product
        with b.scope():
            columns = [self.words_along_k(product.b, _column(b.add(n, j)), i, width) for j in range(self.strip)]
            for number, row in enumerate(transposed(b, columns, self.word, width)):
                self.store(panel, b.add(self.number(i, n), number * width), row, width)

    def interleave(self, panel: str, n: Operand, i: Operand) -> None:
        """A strip's row of words."""
        with self.b.scope():
            words = self.words_across_k(self.product.b, lambda k: (Uniform(k), Affine(n, 1)), i, self.strip)
            self.store(panel, self.number(i, n), words, self.strip)

    def words_along_k(self, value: Value, coordinates: Callable[[Lane], Coordinates], i: Operand, width: int) -> str:
        """Neighbouring words along K."""
        lanes = width * self.along
        x = self.converted(value, Index(coordinates(Affine(self.b.mul(i, self.along), 1)), lanes))
        return x if self.along == 1 else self.cast(x, "bf16", lanes, "i32", width)

    def words_across_k(
        self, value: Value, coordinates: Callable[[Operand], Coordinates], i: Operand, width: int
    ) -> str:
        """Word `i` along K of as many neighbours across it, from as many rows as a word holds elements."""
        b = self.b
        rows = [
            self.converted(value, Index(coordinates(b.add(b.mul(i, self.along), part)), width))
            for part in range(self.along)
        ]
        if self.along == 1:
            return rows[0]
        shorts, ints, sixteen = vector_type("bf16", width), vector_type("i32", width), splat_literal(16, "i32", width)
        low, high = (b.let(f"zext {shorts} {row} to {ints}") for row in rows)
        return b.let(f"or {ints} {low}, {b.let(f'shl {ints} {high}, {sixteen}')}")

    # -- elements and words

    def number(self, i: Operand, n: Operand) -> Operand:
        """Of the word of `right` at row `i` of words and the first column of a strip, `n`."""
        return self.b.add(self.b.mul(n, self.product.k // self.along), self.b.mul(i, self.strip))

    @property
    def word(self) -> str:
        return "i32" if self.along == 2 else "f32"

    def converted(self, value: Value, at: Index) -> str:
        return convert_float(self.b, self.kernel.tiles.vector(value, at), value.element, self.element, at.width)

    def cast(self, x: str, element: str, width: int, other: str, lanes: int) -> str:
        return self.b.let(f"bitcast {vector_type(element, width)} {x} to {vector_type(other, lanes)}")

    def load(self, panel: str, number: Operand, width: int) -> str:
        """Words of a panel from word `number` on."""
        return self.b.let(f"load {vector_type(self.word, width)}, ptr {self.place(panel, number)}, align 4")

    def store(self, panel: str, number: Operand, x: str, width: int) -> None:
        self.b.emit(f"store {vector_type(self.word, width)} {x}, ptr {self.place(panel, number)}, align 4")

    def place(self, panel: str, number: Operand) -> str:
        return self.b.let(f"getelementptr i32, ptr {panel}, i64 {number}")


def _column(n: Operand) -> Callable[[Lane], Coordinates]:
    return lambda along: (along, Uniform(n))


def transposed(b: Builder, rows: list[str], element: str, width: int) -> list[str]:
    """The columns of rows of `width` words, one after the other, in as many vectors of that width as there were.

    Interleaving row i with row i + n / 2 doubles the distance between neighbours of a row; log2(n) times of it bring the
    first words of all rows together.
    """
    half, kind = len(rows) // 2, vector_type(element, width)
    low = [lane // 2 + lane % 2 * width for lane in range(width)]
    high = [lane + width // 2 for lane in low]
    for _ in range(len(rows).bit_length() - 1):
        rows = [b.shuffle(rows[i], rows[i + half], kind, order) for i in range(half) for order in (low, high)]
    return rows


class Packed(AlongN):
    """Packs the operands of a product, whose `accumulator` is computed where it is added.

    Rows of a that are zero, and what is zero along K, are neither packed nor multiplied: the half of a causal attention's tiles on
    the diagonal, and what a tile has more than a tensor.
    """

    def __init__(self, k: "Kernel", product: Product, accumulator: Value) -> None:
        panels = Panels(k, product)
        inner = k.b.min(prefix_bound(k, product.a, 1, product.k), prefix_bound(k, product.b, 0, product.k))
        super().__init__(k, product, panels.words_of(inner, 1), (True, True))
        self.panels, self.accumulator = panels, accumulator
        # those of a register tile all together: they are zeros too
        self.filled = k.b.round_up(prefix_bound(k, product.a, 0, product.m), self.height)
        self.rows, self.words = panels.left(self.filled, inner), panels.right(inner)

    def emit_all(self) -> None:
        b, product = self.b, self.product
        columns = self.vectors * self.width
        b.loop(
            0, product.n, columns,
            lambda n: b.loop(0, self.filled, self.height, lambda m: self.emit_tile(m, n, self.height)),
        )  # fmt: skip
        if self.kernel.tiles.stored.get(self.accumulator) != Buffer(product.buffer):
            b.loop(self.filled, product.m, 1, lambda m: b.loop(0, product.n, self.width, lambda n: self.without(m, n)))

    def without(self, m: Operand, n: Operand) -> None:
        """A vector of the accumulator, to which nothing is added."""
        with self.b.scope():
            at = Index((Uniform(m), Affine(n, 1)), self.width)
            lane = self.kernel.tiles.buffer_pointer(self.product.result.shape, self.element, self.product.buffer, at)
            x = self.before("", at) or splat_literal(0.0, self.element, self.width)
            store(self.b, lane, Vector(x), self.element, None, self.width)

    def before(self, place: str, at: Index) -> str | None:
        return None if is_zero(self.accumulator) else self.kernel.tiles.vector(self.accumulator, at)

    def left(self, row: Uniform, i: Operand) -> str:
        b = self.b
        words = self.product.k // self.panels.along
        word = self.panels.load(self.rows, b.add(b.mul(row.x, words), i), 1)
        return self.as_elements(b.splat(word, self.panels.word, self.width))

    def right(self, i: Operand, column: Lane) -> str:
        assert isinstance(column, Affine)
        return self.as_elements(self.panels.load(self.words, self.panels.number(i, column.base), self.width))

    def as_elements(self, words: str) -> str:
        return words if self.panels.along == 1 else self.panels.cast(words, "i32", self.width, "bf16", 2 * self.width)

    def multiply_add(self, x: str, y: str, before: str) -> str:
        if self.panels.along == 2:
            return add_pairs(self.b, x, y, before, self.width)
        return super().multiply_add(x, y, before)
