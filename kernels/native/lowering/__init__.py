"""TTIR -> the text of an LLVM module. `kernel.py` is where it starts; read it first, then `lanes.py` and `tiles.py`.

kernel.py        a kernel's ops in order: what is written at once, what waits in a group, what is a formula
lanes.py         what is known of an expression over neighbouring elements: uniform, affine, a prefix mask, a vector
tiles.py         tensors as formulas: elements are computed where a loop needs them
index.py         which elements
views.py         the formulas that only change the index
analysis.py      which tiles are kept in memory all the same
places.py        whether the elements of a tile lie at different places
groups.py        loops over tiles: stores, reductions, kept tiles
reductions.py    what a reduction gathers in such a loop, or in one of its own
products/        tl.dot as register tiles, and on AMX
control.py       for, while, if, and what they carry
statements.py    scalar loads and stores, atomics, histograms
failures.py      asserts, and accesses outside a tensor's memory
memory.py        loads and stores of lanes
elementwise.py   a table: each op of arithmetic and what it becomes
affine.py        arithmetic that needs no vector
elements.py      element types and literals
builder.py       writes instructions, loops, index arithmetic
"""

from ..ttir import UnsupportedOpError
from .failures import can_fail
from .kernel import lower

__all__ = ["UnsupportedOpError", "can_fail", "lower"]
