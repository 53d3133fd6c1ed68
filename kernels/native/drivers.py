"""The LLVM IR around a kernel, which is the same for all.

The lowering of a kernel defines one function that runs one program of a grid:

    define internal void @program(ptr noalias %arguments, i32 %i0, i32 %i1, i32 %i2, i32 %n0, i32 %n1, i32 %n2)

`with_work_function` adds the one that runs a thread's share of the programs, and is all that a kernel exports:

    define void @"rms_norm_kernel.work"(ptr %launch, i32 %thread, i32 %threads)

A *launch* is a block of memory: a header of 32 bytes, then the arguments, one slot of 8 bytes each:

    { ptr work, i64 programs, i32 n0, i32 n1, i32 n2, i32 threads }   HEADER, in Python's struct format

`threads.py` runs a launch on one thread or many, `launch.py` lets Python call it, `recorded.py` runs many in a row.
"""

import struct

from .machine import Machine

HEADER = struct.Struct("<QqiiiI")
SLOT_BYTES = 8
assert HEADER.size == 32

_LAUNCH = "%launch = type { ptr, i64, i32, i32, i32, i32, [0 x i64] }"

# Programs of a grid are numbered with the first axis fastest. A thread divides for its first program only, and counts on from
# there: a small program takes no longer than a division.
_WORK = r"""
define void @"NAME.work"(ptr %launch, i32 %thread, i32 %threads) ATTRIBUTES {
entry:
  %p_programs = getelementptr %launch, ptr %launch, i64 0, i32 1
  %programs = load i64, ptr %p_programs
  %p_n0 = getelementptr %launch, ptr %launch, i64 0, i32 2
  %n0 = load i32, ptr %p_n0
  %p_n1 = getelementptr %launch, ptr %launch, i64 0, i32 3
  %n1 = load i32, ptr %p_n1
  %p_n2 = getelementptr %launch, ptr %launch, i64 0, i32 4
  %n2 = load i32, ptr %p_n2
  %arguments = getelementptr %launch, ptr %launch, i64 0, i32 6
  %mine = zext i32 %thread to i64
  %next = add i64 %mine, 1
  %all = zext i32 %threads to i64
  %before = mul i64 %programs, %mine
  %begin = udiv i64 %before, %all
  %until = mul i64 %programs, %next
  %end = udiv i64 %until, %all
  %some = icmp slt i64 %begin, %end
  br i1 %some, label %first, label %done
first:
  %wide_n0 = zext i32 %n0 to i64
  %wide_n1 = zext i32 %n1 to i64
  %row = udiv i64 %begin, %wide_n0
  %first_0 = urem i64 %begin, %wide_n0
  %first_1 = urem i64 %row, %wide_n1
  %first_2 = udiv i64 %row, %wide_n1
  %b0 = trunc i64 %first_0 to i32
  %b1 = trunc i64 %first_1 to i32
  %b2 = trunc i64 %first_2 to i32
  br label %loop
loop:
  %i = phi i64 [ %begin, %first ], [ %i_next, %loop ]
  %i0 = phi i32 [ %b0, %first ], [ %i0_next, %loop ]
  %i1 = phi i32 [ %b1, %first ], [ %i1_next, %loop ]
  %i2 = phi i32 [ %b2, %first ], [ %i2_next, %loop ]
  call void @program(ptr %arguments, i32 %i0, i32 %i1, i32 %i2, i32 %n0, i32 %n1, i32 %n2)
  %i0_plus = add i32 %i0, 1
  %wrap_0 = icmp eq i32 %i0_plus, %n0
  %i0_next = select i1 %wrap_0, i32 0, i32 %i0_plus
  %carry_0 = zext i1 %wrap_0 to i32
  %i1_plus = add i32 %i1, %carry_0
  %wrap_1 = icmp eq i32 %i1_plus, %n1
  %i1_next = select i1 %wrap_1, i32 0, i32 %i1_plus
  %carry_1 = zext i1 %wrap_1 to i32
  %i2_next = add i32 %i2, %carry_1
  %i_next = add i64 %i, 1
  %more = icmp slt i64 %i_next, %end
  br i1 %more, label %loop, label %done
done:
  FENCE
  ret void
}
"""


def with_work_function(program: str, name: str, machine: Machine) -> str:
    """LLVM IR of the kernel `name`: the `@program` that is given, and behind it `work_symbol(name)`.

    What a program stores around the caches others see behind a fence: one for all of a thread's programs.
    """
    body = _WORK.replace("NAME", name).replace("ATTRIBUTES", machine.function_attributes)
    if machine.is_x86 and "!nontemporal" in program:
        fence, declared = "call void @llvm.x86.sse.sfence()", "declare void @llvm.x86.sse.sfence()\n"
    else:
        fence, declared = "", ""
    return f"{program}\n{_LAUNCH}\n{declared}{body.replace('FENCE', fence)}"


def work_symbol(name: str) -> str:
    return f"{name}.work"
