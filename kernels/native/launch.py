"""A compiled kernel and its launches.

    kernel = Kernel(code, "qqqqd")                        four pointers or integers, one float64
    launch = Launch(kernel, (8,), (0, 0, 0, 4096, 1e-6), threads=2)
    run = launch.function([Fill(0, 0), Fill(1, 1), Fill(2, 2)], tensors=3)       remember it for these shapes, and then:
    run(x, w, y)                                          0.2 us, and the kernel

`run` is a function that CPython calls like one of its own, made by us (tensors.py), where `data_ptr()`, `struct` and ctypes
took 1.5 us. To make one takes 6 us.
"""

import struct
from collections.abc import Callable, Sequence
from ctypes import c_float
from dataclasses import dataclass
from math import prod

from . import tensors as native_tensors
from .codegen import Code
from .drivers import HEADER, SLOT_BYTES

# What `run` is bound to: bytes of the launch, how many tensors a call is given, whether the kernel runs without the GIL, how
# many slots are filled; then the launch (drivers.py), then of each slot to fill: its offset in the launch, which tensor's
# address it gets, and how many bytes behind it. A call works on a copy on its stack, so several threads of a program may make
# one at a time.
_TEMPLATE = struct.Struct("<qiiq")
_FILL = struct.Struct("<qqq")
_SLOT_FORMATS = {"q": "q", "f": "f4x", "d": "d"}


class Kernel:
    """Machine code and the format of its arguments.

    `arguments` has a letter for each run-time argument: `q` a pointer or an integer, `f` a float32, `d` a float64.
    """

    def __init__(self, code: Code, arguments: str) -> None:
        self.code = code
        self.arguments = arguments
        self._slots = struct.Struct("<" + "".join(_SLOT_FORMATS[letter] for letter in arguments))

    def pack(self, values: Sequence[float]) -> bytes:
        """The slots of the arguments; 0.5 us for ten. A number beyond float32 is infinite there, as C makes it."""
        try:
            return self._slots.pack(*values)
        except OverflowError:
            pairs = zip(self.arguments, values, strict=True)
            return self._slots.pack(*(c_float(x).value if letter == "f" else x for letter, x in pairs))

    def pack_one(self, argument: int, value: float) -> bytes:
        """The slot of one argument."""
        return struct.pack("<" + _SLOT_FORMATS[self.arguments[argument]], value)


@dataclass(frozen=True, slots=True)
class Fill:
    """An argument of a launch (letter `q`) that each call fills in: the address of the tensor of this number, and more bytes."""

    argument: int
    tensor: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with a grid (up to three axes), its arguments, and the most threads that may run it.

    `values` are addresses and numbers: whoever makes a launch keeps the tensors behind them alive.
    """

    kernel: Kernel
    grid: tuple[int, ...]
    values: Sequence[float]
    threads: int = 1

    def block(self) -> bytes:
        """The launch as its work function reads it."""
        n0, n1, n2 = self.grid + (1,) * (3 - len(self.grid))
        header = HEADER.pack(self.kernel.code.work, prod(self.grid), n0, n1, n2, self.threads)
        return header + self.kernel.pack(self.values)

    def function(
        self, fills: Sequence[Fill] = (), *, tensors: int = 0, release_gil: bool = True
    ) -> Callable[..., None]:
        """A function that runs the launch on as many tensors as it says, with some arguments filled in from them.

        It raises `TypeError` for another number of arguments, and where one to be filled in is no tensor. It keeps the code
        alive. Without the GIL it takes 0.05 us more, and other threads of the program go on.
        """
        assert all(self.kernel.arguments[fill.argument] == "q" and fill.tensor < tensors for fill in fills)
        block = self.block()
        places = [_FILL.pack(HEADER.size + SLOT_BYTES * fill.argument, fill.tensor, fill.offset) for fill in fills]
        template = _TEMPLATE.pack(len(block), tensors, release_gil, len(fills)) + block + b"".join(places)
        return native_tensors.function(template, self.kernel.code)
