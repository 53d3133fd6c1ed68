"""Products with vectors along N: elements of a in every lane, times vectors of b.

acc[i][j] = fma(a[i, k] in all lanes, b[k, j..j+15], acc[i][j])    4 rows x 4 vectors
"""

from typing import TYPE_CHECKING

from ..elements import BITS, Operand, is_float, splat_literal, vector_type
from ..elementwise import convert_float
from ..index import Index, Masks
from ..lanes import Affine, Lane, Uniform, as_vector
from .arithmetic import multiply_add
from .operands import Product

if TYPE_CHECKING:
    from ..kernel import Kernel


class AlongN:
    """`inner` is how far K goes, `exact` says which operands need no mask tested within their bounds."""

    def __init__(self, k: "Kernel", product: Product, inner: Operand, exact: tuple[bool, bool]) -> None:
        self.kernel, self.b, self.product, self.inner, self.exact = k, k.b, product, inner, exact
        self.element = product.result.element
        lanes = max(1, k.b.machine.vector_bytes * 8 // BITS[self.element])
        self.width = min(lanes, product.n)
        self.kind = vector_type(self.element, self.width)
        many = k.b.machine.vector_registers >= 32
        self.vectors = min(4 if many else 2, product.n // self.width)
        # 16 accumulators hide what an addition takes (8 would), and leave registers for the operands
        self.height = 16 // self.vectors if many else 8 // self.vectors

    def emit(self, rows: Operand) -> None:
        columns, heights = self.vectors * self.width, tuple(h for h in (16, 8, 4, 2, 1) if h <= self.height)
        self.b.loop(
            0, self.product.n, columns,
            lambda n: self.b.blocks(0, rows, heights, lambda m, height: self.emit_tile(m, n, height)),
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

    def step(self, rows: list[Uniform], columns: list[Lane], slots: list[str], i: Operand) -> None:
        b = self.b
        with b.scope():
            right = [self.right(i, column) for column in columns]
            for r, row in enumerate(rows):
                left = self.left(row, i)
                for y, slot in zip(right, slots[r * len(columns) :], strict=False):
                    before = b.let(f"load {self.kind}, ptr {slot}")
                    b.emit(f"store {self.kind} {self.multiply_add(left, y, before)}, ptr {slot}")

    def add_to_result(self, row: Uniform, column: Lane, slot: str) -> None:
        """One addition a tile to what was there: sums over K stay short, which halves their error at K = 1024 and more."""
        b, product = self.b, self.product
        at = Index((*product.lead, row, column), self.width)
        lane = self.kernel.tiles.buffer_pointer(product.result.shape, self.element, product.buffer, at)
        place = as_vector(b, lane, f"ptr:{self.element}", 1)
        total = b.let(f"load {self.kind}, ptr {slot}")
        before = self.before(place, at)
        if before is not None:
            add = "fadd" if is_float(self.element) else "add"
            total = b.let(f"{add} {self.kind} {before}, {total}")
        b.emit(f"store {self.kind} {total}, ptr {place}, align 4")

    # -- what the packed form has otherwise

    def before(self, place: str, at: Index) -> str | None:
        """What the products are added to; None for zero."""
        return self.b.let(f"load {self.kind}, ptr {place}, align 4")

    def left(self, row: Uniform, i: Operand) -> str:
        """An element of a, in every lane."""
        x = self.kernel.tiles.vector(self.product.a, Index((*self.product.lead, row, Uniform(i)), 1, self.masks(0)))
        return self.b.splat(self.convert(x, self.product.a.element, 1), self.element, self.width)

    def right(self, i: Operand, column: Lane) -> str:
        """A vector of b."""
        at = Index((*self.product.lead, Uniform(i), column), self.width, self.masks(1))
        return self.convert(self.kernel.tiles.vector(self.product.b, at), self.product.b.element, self.width)

    def multiply_add(self, x: str, y: str, before: str) -> str:
        return multiply_add(self.b, x, y, before, self.element, self.width)

    def masks(self, operand: int) -> Masks:
        return Masks.TRUE if self.exact[operand] else Masks.TEST

    def convert(self, x: str, element: str, width: int) -> str:
        if is_float(element):
            return convert_float(self.b, x, element, self.element, width)
        return self.b.let(f"sext {vector_type(element, width)} {x} to {vector_type(self.element, width)}")
