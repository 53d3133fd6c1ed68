"""Products of bfloat16 by AMX: 16 x 16 float32 sums of 16 x 32 by 32 x 16 bfloat16 in one instruction, 1024 a cycle.

    tiles 0 to 3        32 x 32 of the result, added to
    tiles 4 and 5       32 rows of a, 32 along K, as they lie
    tiles 6 and 7       32 columns of b in words of two along K, as `packed.py` makes them

The unit is set up before a product and released after it: what it holds need not be kept then when the system switches threads.
"""

from typing import TYPE_CHECKING

from ...machine import Machine
from ...ttir import Op
from ..elements import Operand
from .operands import Product, is_packed, takes_pairs
from .packed import Panels

if TYPE_CHECKING:
    from ..kernel import Kernel

_CONFIGURATION = (
    "@lf.tiles = internal constant [64 x i8] ["
    + ", ".join(f"i8 {byte}" for byte in [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8)
    + "], align 64"
)
"""Palette 1; at 16 the bytes of a row of each tile, 64, in two bytes; at 48 its rows, 16."""


def fits_matrix_unit(op: Op, machine: Machine) -> bool:
    """Whether a product is large, and of a kind that the unit has."""
    return machine.has_bf16_tiles and takes_pairs(op, machine) and is_packed(op, machine)


class MatrixUnit:
    """Adds a product to the buffer of its result, or to zero."""

    def __init__(self, k: "Kernel", product: Product, *, from_zero: bool) -> None:
        self.b, self.product, self.from_zero = k.b, product, from_zero
        self.panels = Panels(k, product)
        self.rows, self.words = self.panels.left(), self.panels.right()

    def emit(self) -> None:
        b, product = self.b, self.product
        b.definitions["lf.tiles"] = _CONFIGURATION
        b.call("void", "llvm.x86.ldtilecfg", ("ptr", "@lf.tiles"))
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
        """Between a tile and rows of `width` words, from word `number` on."""
        place = self.panels.place(base, number)
        self.b.call("void", f"llvm.x86.{instruction}", ("i8", tile), ("ptr", place), ("i64", 4 * width))
