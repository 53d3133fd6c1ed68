"""Products of bfloat16 by AMX: 16 x 16 float32 sums of 16 x 32 by 32 x 16 bfloat16 in one instruction, 1024 a cycle.

    tiles 0 to 3        32 x 32 of the result, added to
    tiles 4 and 5       32 rows of a, 32 along K, as they lie
    tiles 6 and 7       32 columns of b in words of two along K, as `packed.py` makes them

The unit is set up before a product and released after it: what it holds need not be kept then when the system switches threads.
"""

from typing import TYPE_CHECKING

from ...machine import Machine
from ...ttir import Op
from ..builder import Builder
from ..elements import Operand
from ..index import Index
from ..lanes import Affine, Uniform
from .operands import Product, is_bfloat16, is_contiguous, is_packed, loaded, mask_is_its_bounds
from .packed import Panels

if TYPE_CHECKING:
    from ..kernel import Kernel


def _set_up(b: Builder, columns: int) -> None:
    """All tiles have 16 rows of 64 bytes, those of the result and of b as many words as there are columns, up to 16."""
    width = 4 * min(columns, 16)
    widths = [width] * 4 + [64, 64] + [width] * 2
    palette = [1] + [0] * 15 + [byte for each in widths for byte in (each, 0)] + [0] * 16 + [16] * 8 + [0] * 8
    b.definitions[f"lf.tiles.{width}"] = (
        f"@lf.tiles.{width} = internal constant [64 x i8] [{', '.join(f'i8 {byte}' for byte in palette)}], align 64"
    )
    b.call("void", "llvm.x86.ldtilecfg", ("ptr", f"@lf.tiles.{width}"))


def fits_matrix_unit(op: Op, machine: Machine) -> bool:
    """Whether a product is large, and of a kind that the unit has."""
    return machine.has_bf16_tiles and is_bfloat16(op) and is_packed(op, machine)


class MatrixUnit:
    """Adds a product to the buffer of its result, or to zero."""

    def __init__(self, k: "Kernel", product: Product, *, from_zero: bool) -> None:
        self.b, self.product, self.from_zero = k.b, product, from_zero
        self.panels = Panels(k, product)
        self.rows, self.words = self.panels.left(product.m, product.k), self.panels.right(product.k)

    def emit(self) -> None:
        b, product = self.b, self.product
        _set_up(b, product.n)
        b.loop(0, product.n, 32, lambda n: b.loop(0, product.m, 32, lambda m: self.emit_block(m, n)))
        b.call("void", "llvm.x86.tilerelease")

    def emit_block(self, m: Operand, n: Operand) -> None:
        b, product = self.b, self.product
        sums = [(tile, b.add(m, 16 * (tile // 2)), b.add(n, 16 * (tile % 2))) for tile in range(4)]
        with b.scope():
            for tile, row, column in sums:
                if self.from_zero:
                    b.call("void", "llvm.x86.tilezero", ("i8", tile))
                else:
                    self.move("tileloadd64", tile, product.buffer, b.add(b.mul(row, product.n), column), product.n)
            b.loop(0, product.k // 2, 16, lambda i: self.step(m, n, i))
            for tile, row, column in sums:
                self.move("tilestored64", tile, product.buffer, b.add(b.mul(row, product.n), column), product.n)

    def step(self, m: Operand, n: Operand, i: Operand) -> None:
        """16 words along K."""
        b = self.b
        with b.scope():
            for half in (0, 1):
                words = self.product.k // 2
                row, column = b.add(m, 16 * half), b.add(n, 16 * half)
                self.move("tileloadd64", 4 + half, self.rows, b.add(b.mul(row, words), i), words)
                self.move("tileloadd64", 6 + half, self.words, self.panels.number(i, column), 16)
            for tile in range(4):
                b.call("void", "llvm.x86.tdpbf16ps", ("i8", tile), ("i8", 4 + tile // 2), ("i8", 6 + tile % 2))

    def move(self, instruction: str, tile: int, base: str, number: Operand, width: int) -> None:
        _move(self.b, instruction, tile, self.panels.place(base, number), 4 * width)


def _move(b: Builder, instruction: str, tile: int, place: Operand, stride: Operand) -> None:
    """Between a tile and memory, with rows `stride` bytes apart."""
    b.call("void", f"llvm.x86.{instruction}", ("i8", tile), ("ptr", place), ("i64", stride))


LEAST_COLUMNS = 4


def streams_through_matrix_unit(k: "Kernel", product: Product) -> bool:
    """Whether the rows of a, as they lie in memory, can be multiplied by few columns."""
    op = product.result.op
    assert op is not None
    return (
        k.b.machine.has_bf16_tiles
        and not k.check_bounds  # the unit reads rows itself, and checks nothing
        and is_bfloat16(op)
        and LEAST_COLUMNS <= product.n <= 16
        and not product.lead
        and product.m % 16 == 0
        and product.k % 32 == 0
        and mask_is_its_bounds(k, product.a)
        and is_contiguous(k, product.a, (), 1)
        and _row_stride(k, product, 0, 0) is not None
    )


def _row_stride(k: "Kernel", product: Product, m: Operand, i: Operand) -> Affine | None:
    """Address of a row's element, and how many elements further the next row's lies."""
    found = loaded(k, product.a)
    if found is None or found[1] != sorted(found[1]):
        return None
    lane = k.tiles.lanes(found[0].operands[0], Index((Affine(m, 1), Uniform(i)), 16))
    return lane if isinstance(lane, Affine) else None


class Streamed:
    """Adds the product of many rows, read where they lie, and up to 16 columns to the buffer of its result.

    tiles 0 to 3: 64 rows of the result; 4 and 5, in turns: rows of a; 6: columns of b
    """

    TALL = 4

    def __init__(self, k: "Kernel", product: Product, inner: Operand) -> None:
        self.kernel, self.b, self.product, self.inner = k, k.b, product, inner
        self.panels = Panels(k, product)
        self.words = self.panels.right(inner)

    def emit(self, rows: Operand) -> None:
        """`rows` is a multiple of 16, and `inner` of 32."""
        b = self.b
        _set_up(b, self.product.n)
        b.blocks(0, rows, (16 * self.TALL, 16), lambda m, height: self.emit_rows(m, height // 16))
        b.call("void", "llvm.x86.tilerelease")

    def emit_rows(self, m: Operand, tiles: int) -> None:
        b, n = self.b, self.product.n
        with b.scope():
            sums = [self.panels.place(self.product.buffer, b.mul(b.add(m, 16 * tile), n)) for tile in range(tiles)]
            for tile, place in enumerate(sums):
                _move(b, "tileloadd64", tile, place, 4 * n)
            b.loop(0, self.inner, 32, lambda i: self.step(m, i, tiles))
            for tile, place in enumerate(sums):
                _move(b, "tilestored64", tile, place, 4 * n)

    def step(self, m: Operand, i: Operand, tiles: int) -> None:
        b = self.b
        with b.scope():
            number = self.panels.number(b.div(i, 2), 0)
            _move(b, "tileloadd64", 6, self.panels.place(self.words, number), 4 * self.product.n)
            for tile in range(tiles):
                lane = _row_stride(self.kernel, self.product, b.add(m, 16 * tile), i)
                assert lane is not None
                _move(b, "tileloadd64", 4 + tile % 2, lane.base, b.mul(lane.stride, 2))
                b.call("void", "llvm.x86.tdpbf16ps", ("i8", tile), ("i8", 4 + tile % 2), ("i8", 6))
