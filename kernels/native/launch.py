"""A compiled kernel and its launches.

    kernel = Kernel(code, "qqqqd")                        four pointers or integers, one float64
    launch = Launch(kernel, (8,), (x, w, y, 4096, 1e-6), threads=2)
    run = launch.function(filled=(0, 1, 2))               remember it for these shapes, and then, for any tensors of them:
    run(x.data_ptr(), w.data_ptr(), y.data_ptr())         0.1 us, and the kernel

`run` is a function that CPython calls like one of its own, made by us: 0.08 us with 6 pointers to put in place, where `struct`
took 0.5 us to place them and ctypes 0.2 to call the kernel. To make one takes 6 us.
"""

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from . import codegen, threads
from .codegen import Code
from .drivers import HEADER, SLOT_BYTES

# What `run` is bound to: bytes of the launch, how many of its slots a call fills, whether the kernel runs without the GIL;
# then the launch (drivers.py), then the offsets in it of the slots to fill. A call works on a copy on its stack, so several
# threads of a program may make one at a time.
_TEMPLATE = struct.Struct("<qii")
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
        """The slots of the arguments; 0.5 us for ten."""
        return self._slots.pack(*values)

    def pack_one(self, argument: int, value: float) -> bytes:
        """The slot of one argument."""
        return struct.pack("<" + _SLOT_FORMATS[self.arguments[argument]], value)


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

    def function(self, filled: Sequence[int] = (), *, release_gil: bool = True) -> Callable[..., None]:
        """A function that runs the launch, with the arguments at the places `filled` (letter `q`) given to each call.

        It raises `TypeError` for another number of arguments and for what is no int. It keeps the code alive. Without the
        GIL it takes 0.05 us more, and other threads of the program go on.
        """
        assert all(self.kernel.arguments[i] == "q" for i in filled)
        block = self.block()
        offsets = struct.pack(f"<{len(filled)}q", *(HEADER.size + SLOT_BYTES * i for i in filled))
        template = _TEMPLATE.pack(len(block), len(filled), release_gil) + block + offsets
        return _function_type()(template, self.kernel.code)


_IR = r"""
%template = type { i64, i32, i32, [0 x i8] }
@none = external global i8
@type_error = external global i8
@wrong_count = private constant [60 x i8] c"a launch got more or fewer values than it has slots to fill\00"
declare void @launch(ptr)
declare ptr @PyBytes_AsString(ptr)
declare ptr @PyLong_AsVoidPtr(ptr)
declare ptr @PyErr_Occurred()
declare void @PyErr_SetString(ptr, ptr)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare void @Py_IncRef(ptr)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define ptr @call(ptr %self, ptr %values, i64 %given) nounwind {
entry:
  %template = call ptr @PyBytes_AsString(ptr %self)
  %bytes = load i64, ptr %template
  %p_count = getelementptr %template, ptr %template, i64 0, i32 1
  %count = load i32, ptr %p_count
  %wanted = zext i32 %count to i64
  %right = icmp eq i64 %given, %wanted
  br i1 %right, label %copy, label %wrong
wrong:
  call void @PyErr_SetString(ptr @type_error, ptr @wrong_count)
  ret ptr null
copy:
  %block = alloca i8, i64 %bytes, align 64
  %source = getelementptr %template, ptr %template, i64 0, i32 3
  call void @llvm.memcpy.p0.p0.i64(ptr %block, ptr %source, i64 %bytes, i1 false)
  %offsets = getelementptr i8, ptr %source, i64 %bytes
  %none_to_fill = icmp eq i64 %wanted, 0
  br i1 %none_to_fill, label %run, label %fill
fill:
  %i = phi i64 [ 0, %copy ], [ %i_next, %filled ]
  %p_value = getelementptr ptr, ptr %values, i64 %i
  %value = load ptr, ptr %p_value
  %number = call ptr @PyLong_AsVoidPtr(ptr %value)
  %null = icmp eq ptr %number, null
  br i1 %null, label %doubt, label %filled
doubt:
  %error = call ptr @PyErr_Occurred()
  %failed = icmp ne ptr %error, null
  br i1 %failed, label %raise, label %filled
raise:
  ret ptr null
filled:
  %p_offset = getelementptr i64, ptr %offsets, i64 %i
  %offset = load i64, ptr %p_offset, align 1
  %slot = getelementptr i8, ptr %block, i64 %offset
  store ptr %number, ptr %slot
  %i_next = add i64 %i, 1
  %more = icmp ult i64 %i_next, %wanted
  br i1 %more, label %fill, label %run
run:
  %p_release = getelementptr %template, ptr %template, i64 0, i32 2
  %release = load i32, ptr %p_release
  %with_gil = icmp eq i32 %release, 0
  br i1 %with_gil, label %held, label %released
held:
  call void @launch(ptr %block)
  br label %done
released:
  %state = call ptr @PyEval_SaveThread()
  call void @launch(ptr %block)
  call void @PyEval_RestoreThread(ptr %state)
  br label %done
done:
  call void @Py_IncRef(ptr @none)
  ret ptr @none
}
"""


class _MethodDefinition(ctypes.Structure):
    """CPython's `PyMethodDef`."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


_METH_FASTCALL = 0x0080


@functools.cache
def _function_type() -> Callable[[bytes, Any], Callable[..., None]]:
    """Makes a function of a template. It keeps the template as its self and `owner` as its module."""
    python = ctypes.pythonapi
    names = ("PyBytes_AsString", "PyLong_AsVoidPtr", "PyErr_Occurred", "PyErr_SetString", "PyEval_SaveThread",
             "PyEval_RestoreThread", "Py_IncRef")  # fmt: skip
    imports = {name: ctypes.cast(getattr(python, name), ctypes.c_void_p).value or 0 for name in names}
    imports |= {"none": id(None), "type_error": id(TypeError), "launch": threads.library()["launch"]}
    library = codegen.library(_IR, "llama_fast_python", exports=("call",), imports=imports)
    definition = _MethodDefinition(b"launch", library["call"], _METH_FASTCALL, None)
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.py_object)(
        ("PyCFunction_NewEx", python)
    )

    def make(template: bytes, owner: Any, _alive: Any = (library, definition)) -> Callable[..., None]:
        return new(ctypes.addressof(definition), template, owner)

    return make
