"""Kernels in LLVM IR, written by hand: what the lowering of a Triton kernel would give."""

import pytest
import torch

from llama_fast.kernels.native import codegen
from llama_fast.kernels.native.launch import Kernel
from llama_fast.kernels.native.machine import Machine, host

native = pytest.mark.skipif(host() is None, reason="there are no native kernels on this CPU")

_PROGRAM = """
define internal void @program(ptr noalias %arguments, i32 %i0, i32 %i1, i32 %i2, i32 %n0, i32 %n1, i32 %n2) #0 {
  %a = mul i32 %i2, %n1
  %b = add i32 %a, %i1
  %c = mul i32 %b, %n0
  %sum = add i32 %c, %i0
  %number = zext i32 %sum to i64
"""

# counts[number of the program] += 1 and threads[number of the program] = the system's number of the thread
_COUNT = """
  %counts = load ptr, ptr %arguments
  %p_count = getelementptr i64, ptr %counts, i64 %number
  %count = load i64, ptr %p_count
  %count_1 = add i64 %count, 1
  store i64 %count_1, ptr %p_count
  %s_threads = getelementptr i64, ptr %arguments, i64 1
  %threads = load ptr, ptr %s_threads
  %p_thread = getelementptr i64, ptr %threads, i64 %number
  %thread = call i32 @gettid()
  %thread_64 = sext i32 %thread to i64
  store i64 %thread_64, ptr %p_thread
  ret void
}
declare i32 @gettid()
"""

# y[i] = x[programs - 1 - i] + f + d: a program reads what another program of the launch before has written
_MIRROR = """
  %y = load ptr, ptr %arguments
  %s_x = getelementptr i64, ptr %arguments, i64 1
  %x = load ptr, ptr %s_x
  %s_f = getelementptr i64, ptr %arguments, i64 2
  %f = load float, ptr %s_f
  %s_d = getelementptr i64, ptr %arguments, i64 3
  %d64 = load double, ptr %s_d
  %d32 = fptrunc double %d64 to float
  %last = sub i32 %n0, 1
  %mirrored = sub i32 %last, %i0
  %o_x = zext i32 %mirrored to i64
  %p_x = getelementptr float, ptr %x, i64 %o_x
  %v = load float, ptr %p_x
  %v_f = fadd float %v, %f
  %v_d = fadd float %v_f, %d32
  %p_y = getelementptr float, ptr %y, i64 %number
  store float %v_d, ptr %p_y
  ret void
}
"""

# each program sleeps for so many microseconds
_SLEEP = """
  %time = load i32, ptr %arguments
  %ignored = call i32 @usleep(i32 %time)
  ret void
}
declare i32 @usleep(i32)
"""


def _module(body: str, machine: Machine) -> str:
    return f"{_PROGRAM}{body}\nattributes #0 = {{ {machine.function_attributes} }}\n"


def count_ir(machine: Machine) -> str:
    return _module(_COUNT, machine)


def mirror_ir(machine: Machine) -> str:
    return _module(_MIRROR, machine)


def count_kernel() -> Kernel:
    return Kernel(codegen.compile_module(count_ir(host()), "count", host()), "qq")


def sleep_kernel() -> Kernel:
    return Kernel(codegen.compile_module(_module(_SLEEP, host()), "sleep", host()), "q")


def mirror_kernel() -> Kernel:
    return Kernel(codegen.compile_module(mirror_ir(host()), "mirror", host()), "qqfd")


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)
