"""Functions that CPython calls like its own and that look into tensors natively: what a remembered call (`remembered.py`) needs.

    describe = description("tt..")                     two tensors and two numbers
    describe(x, weight, 1e-6, True)                    (b"...", None, None, None, True), to look the call up by
    run = function(template, code)                     a launch (launch.py) that is given tensors
    run(x, weight, y, rstd)

Each takes 0.2 us. `x.shape`, `x.stride()` and `x.dtype` of three tensors took 2.4, and `x.data_ptr()` of four 1.2.

What is inside a tensor they ask of libtorch's C interface, which AOTInductor's code is linked with. It wants the address of a
C++ tensor (one pointer, to what `Tensor._cdata` gives the address of), and inside Python's object stands one.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from ..torch_compat import PrivateNameGoneError, offsets_in_tensors
from ..variables import CHECK_BOUNDS
from . import codegen, threads
from .once import once

_MOST_DIMENSIONS = 64  # as in PyTorch's own loops
_WORDS = 4 + 2 * _MOST_DIMENSIONS  # of a description: class, dispatch keys, dtype, dimensions, sizes, strides

_IR = r"""
%template = type { i64, i32, i32, i64, [0 x i8] }
%fill = type { i64, i64, i64 }
@none = external global i8
@tensor_type = external global i8
@type_error = external global i8
@runtime_error = external global i8
@float_type = external global i8
@check_bounds = private constant [VARIABLE_BYTES x i8] c"VARIABLE\00"
@not_set = private constant [1 x i8] c"0"
@wrong_count = private constant [58 x i8] c"a launch got more or fewer tensors than it has places for\00"
@not_a_tensor = private constant [41 x i8] c"a launch takes tensors, got another type\00"
@no_answer = private constant [41 x i8] c"PyTorch does not say what is in a tensor\00"
declare void @launch(ptr)
declare i32 @aoti_torch_get_data_ptr(ptr, ptr)
declare i32 @aoti_torch_get_dtype(ptr, ptr)
declare i32 @aoti_torch_get_dim(ptr, ptr)
declare i32 @aoti_torch_get_sizes(ptr, ptr)
declare i32 @aoti_torch_get_strides(ptr, ptr)
declare ptr @getenv(ptr)
declare ptr @PyBytes_AsString(ptr)
declare ptr @PyBytes_FromStringAndSize(ptr, i64)
declare void @PyErr_SetString(ptr, ptr)
declare double @PyFloat_AsDouble(ptr)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare ptr @PyObject_Type(ptr)
declare ptr @PyTuple_New(i64)
declare i32 @PyTuple_SetItem(ptr, i64, ptr)
declare i32 @PyType_IsSubtype(ptr, ptr)
declare void @Py_IncRef(ptr)
declare void @Py_DecRef(ptr)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

; the C++ tensor in a Python object; null where it is none
define internal ptr @tensor_in(ptr %object) nounwind alwaysinline {
  %type = call ptr @PyObject_Type(ptr %object)
  %is_tensor = call i32 @PyType_IsSubtype(ptr %type, ptr @tensor_type)
  call void @Py_DecRef(ptr %type)
  %no = icmp eq i32 %is_tensor, 0
  %place = getelementptr i8, ptr %object, i64 TENSOR_OFFSET
  %tensor = select i1 %no, ptr null, ptr %place
  ret ptr %tensor
}

; runs a launch, whose template is %self, on the tensors given: filled in on the stack, then without the GIL
define ptr @call(ptr %self, ptr %values, i64 %given) nounwind {
entry:
  %address = alloca ptr
  %template = call ptr @PyBytes_AsString(ptr %self)
  %bytes = load i64, ptr %template
  %p_wanted = getelementptr %template, ptr %template, i64 0, i32 1
  %narrow_wanted = load i32, ptr %p_wanted
  %wanted = zext i32 %narrow_wanted to i64
  %right = icmp eq i64 %given, %wanted
  br i1 %right, label %copy, label %wrong
wrong:
  call void @PyErr_SetString(ptr @type_error, ptr @wrong_count)
  ret ptr null
copy:
  %block = alloca i8, i64 %bytes, align 64
  %source = getelementptr %template, ptr %template, i64 0, i32 4
  call void @llvm.memcpy.p0.p0.i64(ptr %block, ptr %source, i64 %bytes, i1 false)
  %fills = getelementptr i8, ptr %source, i64 %bytes
  %p_count = getelementptr %template, ptr %template, i64 0, i32 3
  %count = load i64, ptr %p_count
  br label %next
next:
  %i = phi i64 [ 0, %copy ], [ %i_next, %filled ]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %fill, label %run
fill:
  %p_slot = getelementptr %fill, ptr %fills, i64 %i, i32 0
  %slot_offset = load i64, ptr %p_slot
  %p_number = getelementptr %fill, ptr %fills, i64 %i, i32 1
  %number = load i64, ptr %p_number
  %p_behind = getelementptr %fill, ptr %fills, i64 %i, i32 2
  %behind = load i64, ptr %p_behind
  %p_value = getelementptr ptr, ptr %values, i64 %number
  %value = load ptr, ptr %p_value
  %tensor = call ptr @tensor_in(ptr %value)
  %none = icmp eq ptr %tensor, null
  br i1 %none, label %other, label %ask
other:
  call void @PyErr_SetString(ptr @type_error, ptr @not_a_tensor)
  ret ptr null
ask:
  %error = call i32 @aoti_torch_get_data_ptr(ptr %tensor, ptr %address)
  %unknown = icmp ne i32 %error, 0
  br i1 %unknown, label %raise, label %filled
raise:
  call void @PyErr_SetString(ptr @runtime_error, ptr @no_answer)
  ret ptr null
filled:
  %start = load ptr, ptr %address
  %place = getelementptr i8, ptr %start, i64 %behind
  %slot = getelementptr i8, ptr %block, i64 %slot_offset
  store ptr %place, ptr %slot
  %i_next = add i64 %i, 1
  br label %next
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

; a tuple: bytes, then each value that is not in them, else None. In the bytes: whether bounds are checked; of a tensor its class, dispatch
; keys, dtype, sizes and strides; of a float its bits, which tell 0.0 from -0.0, and NaN from nothing. %self has a `t` for a tensor.
; None where something is given as a tensor that has no sizes and strides, or more than can be
define ptr @describe(ptr %self, ptr %values, i64 %given) nounwind {
entry:
  %dtype = alloca i32
  %dimensions = alloca i64
  %sizes = alloca ptr
  %strides = alloca ptr
  %room = mul i64 %given, WORDS
  %most = add i64 %room, 1
  %words = alloca i64, i64 %most
  %variable = call ptr @getenv(ptr @check_bounds)
  %is_unset = icmp eq ptr %variable, null
  %setting = select i1 %is_unset, ptr @not_set, ptr %variable
  %first = load i8, ptr %setting
  %checked = zext i8 %first to i64
  store i64 %checked, ptr %words
  %kinds = call ptr @PyBytes_AsString(ptr %self)
  %items = add i64 %given, 1
  %tuple = call ptr @PyTuple_New(i64 %items)
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %behind, %described ]
  %used = phi i64 [ 1, %entry ], [ %used_next, %described ]
  %more = icmp ult i64 %i, %given
  %behind = add i64 %i, 1
  br i1 %more, label %look, label %done
look:
  %p_value = getelementptr ptr, ptr %values, i64 %i
  %value = load ptr, ptr %p_value
  %p_kind = getelementptr i8, ptr %kinds, i64 %i
  %kind = load i8, ptr %p_kind
  %may_be_tensor = icmp eq i8 %kind, 116
  %is_none = icmp eq ptr %value, @none
  %is_not_none = xor i1 %is_none, true
  %is_tensor = and i1 %may_be_tensor, %is_not_none
  %p_word = getelementptr i64, ptr %words, i64 %used
  br i1 %is_tensor, label %unpack, label %keep
keep:
  %type = call ptr @PyObject_Type(ptr %value)
  call void @Py_DecRef(ptr %type)
  %is_float = icmp eq ptr %type, @float_type
  br i1 %is_float, label %number, label %plain
plain:
  store i64 -1, ptr %p_word
  %used_plus = add i64 %used, 1
  br label %described
number:
  %double = call double @PyFloat_AsDouble(ptr %value)
  %bits = bitcast double %double to i64
  store i64 -2, ptr %p_word
  %p_bits = getelementptr i64, ptr %p_word, i64 1
  store i64 %bits, ptr %p_bits
  %used_two = add i64 %used, 2
  br label %described
unpack:
  %tensor = call ptr @tensor_in(ptr %value)
  %other = icmp eq ptr %tensor, null
  br i1 %other, label %unknown, label %ask
ask:
  %error_0 = call i32 @aoti_torch_get_dtype(ptr %tensor, ptr %dtype)
  %error_1 = call i32 @aoti_torch_get_dim(ptr %tensor, ptr %dimensions)
  %error_2 = call i32 @aoti_torch_get_sizes(ptr %tensor, ptr %sizes)
  %error_3 = call i32 @aoti_torch_get_strides(ptr %tensor, ptr %strides)
  %error_01 = or i32 %error_0, %error_1
  %error_23 = or i32 %error_2, %error_3
  %error = or i32 %error_01, %error_23
  %no_answer = icmp ne i32 %error, 0
  %n = load i64, ptr %dimensions
  %too_many = icmp ugt i64 %n, MOST_DIMENSIONS
  %hidden = or i1 %no_answer, %too_many
  br i1 %hidden, label %unknown, label %write
write:
  %dtype_now = load i32, ptr %dtype
  %wide_dtype = zext i32 %dtype_now to i64
  store i64 %wide_dtype, ptr %p_word
  %p_n = getelementptr i64, ptr %p_word, i64 1
  store i64 %n, ptr %p_n
  %class = call ptr @PyObject_Type(ptr %value)
  call void @Py_DecRef(ptr %class)
  %p_class = getelementptr i64, ptr %p_word, i64 2
  store ptr %class, ptr %p_class
  %implementation = load ptr, ptr %tensor
  %p_own_keys = getelementptr i8, ptr %implementation, i64 KEYS_OFFSET
  %own_keys = load i64, ptr %p_own_keys
  %p_keys = getelementptr i64, ptr %p_word, i64 3
  store i64 %own_keys, ptr %p_keys
  %bytes = shl i64 %n, 3
  %p_sizes = getelementptr i64, ptr %p_word, i64 4
  %sizes_now = load ptr, ptr %sizes
  call void @llvm.memcpy.p0.p0.i64(ptr %p_sizes, ptr %sizes_now, i64 %bytes, i1 false)
  %p_strides = getelementptr i64, ptr %p_sizes, i64 %n
  %strides_now = load ptr, ptr %strides
  call void @llvm.memcpy.p0.p0.i64(ptr %p_strides, ptr %strides_now, i64 %bytes, i1 false)
  %twice = shl i64 %n, 1
  %used_more = add i64 %used, 4
  %used_all = add i64 %used_more, %twice
  br label %described
described:
  %used_next = phi i64 [ %used_plus, %plain ], [ %used_two, %number ], [ %used_all, %write ]
  %kept = phi ptr [ %value, %plain ], [ @none, %number ], [ @none, %write ]
  call void @Py_IncRef(ptr %kept)
  %ignored = call i32 @PyTuple_SetItem(ptr %tuple, i64 %behind, ptr %kept)
  br label %next
unknown:
  call void @Py_DecRef(ptr %tuple)
  call void @Py_IncRef(ptr @none)
  ret ptr @none
done:
  %used_bytes = shl i64 %used, 3
  %description = call ptr @PyBytes_FromStringAndSize(ptr %words, i64 %used_bytes)
  %ignored_last = call i32 @PyTuple_SetItem(ptr %tuple, i64 0, ptr %description)
  ret ptr %tuple
}
"""
_OF_PYTHON = (
    "PyBytes_AsString", "PyBytes_FromStringAndSize", "PyErr_SetString", "PyFloat_AsDouble", "PyEval_SaveThread", "PyEval_RestoreThread",
    "PyObject_Type", "PyTuple_New", "PyTuple_SetItem", "PyType_IsSubtype", "Py_IncRef", "Py_DecRef",
)  # fmt: skip
_OF_PYTORCH = tuple(f"aoti_torch_get_{what}" for what in ("data_ptr", "dtype", "dim", "sizes", "strides"))


@functools.cache
def why_unreadable() -> str | None:
    """Why tensors of this PyTorch cannot be looked into; None where they can."""
    try:
        offsets_in_tensors()
        _addresses(ctypes.CDLL(torch._C.__file__), _OF_PYTORCH)
    except (PrivateNameGoneError, AttributeError) as error:
        return f"what is in a tensor is not found: {error}"
    return None


def description(kinds: str) -> Callable[..., tuple[Any, ...] | None]:
    """A function that tells calls apart by class, dispatch keys (what device, and what else wants to see its calls), dtype, sizes
    and strides of the arguments that are tensors (`t`, or None), by what the others are, and by whether bounds are checked.

    `kinds` has a letter for each argument; a call may leave the last ones out. None where a tensor cannot be described: it has
    no strides, or more than 64 dimensions.
    """
    return _function("describe", kinds.encode(), None)


def function(template: bytes, owner: Any) -> Callable[..., None]:
    """A function that runs the launch of a template (launch.py). It keeps `owner` alive."""
    return _function("call", template, owner)


class _MethodDefinition(ctypes.Structure):
    """CPython's `PyMethodDef`."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


_METH_FASTCALL = 0x0080


def _function(name: str, data: bytes, owner: Any) -> Callable[..., Any]:
    """A function of the library, with `data` as its self and `owner` as its module."""
    new, definitions, _ = _functions()
    made: Callable[..., Any] = new(ctypes.addressof(definitions[name]), data, owner)
    return made


@once
def _functions() -> tuple[Callable[..., Any], dict[str, _MethodDefinition], Any]:
    python, pytorch = ctypes.pythonapi, ctypes.CDLL(torch._C.__file__)
    imports = _addresses(python, _OF_PYTHON) | _addresses(pytorch, _OF_PYTORCH)
    imports |= {"none": id(None), "tensor_type": id(torch.Tensor), "type_error": id(TypeError)}
    imports |= {"float_type": id(float), "runtime_error": id(RuntimeError), "launch": threads.library()["launch"]}
    tensor, keys = offsets_in_tensors()
    numbers: dict[str, object] = dict(
        TENSOR_OFFSET=tensor, KEYS_OFFSET=keys, WORDS=_WORDS, MOST_DIMENSIONS=_MOST_DIMENSIONS
    )
    numbers |= dict(VARIABLE_BYTES=len(CHECK_BOUNDS) + 1, VARIABLE=CHECK_BOUNDS)
    ir = functools.reduce(lambda text, name: text.replace(name, str(numbers[name])), numbers, _IR)
    library = codegen.library(ir, "llama_fast_tensors", exports=("call", "describe"), imports=imports)
    definitions = {
        name: _MethodDefinition(name.encode(), library[name], _METH_FASTCALL, None) for name in ("call", "describe")
    }
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.py_object)(
        ("PyCFunction_NewEx", python)
    )
    return new, definitions, library  # which the definitions do not keep in memory


def _addresses(library: ctypes.CDLL, names: tuple[str, ...]) -> dict[str, int]:
    return {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names}
