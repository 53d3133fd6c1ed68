"""A launch on PyTorch's own threads.

    threads_for(programs, work)       how many threads a launch may have, from its size
    library()["launch"]               a function that runs a launch (drivers.py) on that many, or on as many as PyTorch has

The threads are OpenMP's, of the runtime that PyTorch has loaded: two pools of as many threads as cores would take turns on
them. `torch.set_num_threads` holds here too, and a launch inside a parallel region runs on the thread that makes it.
A forked child has none of these threads and waits for them for ever, so there every launch runs on one.
"""

import ctypes
import os
from typing import Any

import torch

from . import codegen
from .once import once

# A team has always as many threads as PyTorch's, and those that a launch does not need do nothing: a smaller team makes
# OpenMP end the threads that are left over, and start them again for the next larger one (launches in turns of 2 and 4
# threads on a busy machine: 2.9 ms each, so 0.045).
#
# Where other programs want the cores too, a team waits for the thread that has none, up to 4 ms at every turn. Who has
# waited four times as long as it worked (and 300 us, a thread's longest way out of sleep) makes all launches run on one
# thread for eight times as long as it waited: so waiting takes at most a ninth of the time.
_IR = r"""
%launch = type { ptr, i64, i32, i32, i32, i32, [0 x i64] }
%region = type { ptr, i64 }
@limit = global i32 2147483647
@alone_until = internal global i64 0
declare void @GOMP_parallel(ptr, ptr, i32, i32)
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
declare i32 @omp_get_max_threads()
declare i32 @clock_gettime(i32, ptr)
declare i32 @llvm.smin.i32(i32, i32)

define void @launch(ptr %launch) nounwind {
  %p_threads = getelementptr %launch, ptr %launch, i64 0, i32 5
  %threads = load i32, ptr %p_threads
  %limit = load atomic i32, ptr @limit monotonic, align 4
  %allowed = call i32 @llvm.smin.i32(i32 %threads, i32 %limit)
  %one = icmp sle i32 %allowed, 1
  br i1 %one, label %alone, label %many
many:
  %team = call i32 @omp_get_max_threads()
  %several = icmp sgt i32 %team, 1
  br i1 %several, label %look, label %alone
look:
  %begin = call i64 @now()
  %until = load atomic i64, ptr @alone_until monotonic, align 8
  %busy = icmp slt i64 %begin, %until
  br i1 %busy, label %alone, label %together
alone:
  %work = load ptr, ptr %launch
  tail call void %work(ptr %launch, i32 0, i32 1)
  ret void
together:
  %region = alloca %region
  store ptr %launch, ptr %region
  call void @GOMP_parallel(ptr @member, ptr %region, i32 %team, i32 0)
  %end = call i64 @now()
  %p_own_end = getelementptr %region, ptr %region, i64 0, i32 1
  %own_end = load i64, ptr %p_own_end
  %late = call i1 @late(i64 %begin, i64 %own_end, i64 %end)
  ret void
}

define internal void @member(ptr %region) nounwind {
  %launch = load ptr, ptr %region
  %thread = call i32 @omp_get_thread_num()
  %team = call i32 @omp_get_num_threads()
  %p_threads = getelementptr %launch, ptr %launch, i64 0, i32 5
  %most = load i32, ptr %p_threads
  %threads = call i32 @llvm.smin.i32(i32 %most, i32 %team)
  %needed = icmp slt i32 %thread, %threads
  br i1 %needed, label %run, label %done
run:
  %work = load ptr, ptr %launch
  call void %work(ptr %launch, i32 %thread, i32 %threads)
  %caller = icmp eq i32 %thread, 0
  br i1 %caller, label %note, label %done
note:
  %own_end = call i64 @now()
  %p_own_end = getelementptr %region, ptr %region, i64 0, i32 1
  store i64 %own_end, ptr %p_own_end
  br label %done
done:
  ret void
}

; nanoseconds of CLOCK_MONOTONIC
define i64 @now() nounwind {
  %time = alloca { i64, i64 }
  %ignored = call i32 @clock_gettime(i32 1, ptr %time)
  %seconds = load i64, ptr %time
  %p_rest = getelementptr { i64, i64 }, ptr %time, i64 0, i32 1
  %rest = load i64, ptr %p_rest
  %scaled = mul i64 %seconds, 1000000000
  %now = add i64 %scaled, %rest
  ret i64 %now
}

; whether who worked from %begin to %own_end has waited too long by %now
define i1 @late(i64 %begin, i64 %own_end, i64 %now) nounwind {
  %own = sub i64 %own_end, %begin
  %waited = sub i64 %now, %own_end
  %patience = mul i64 %own, 4
  %most = add i64 %patience, 300000
  %late = icmp sgt i64 %waited, %most
  br i1 %late, label %give_up, label %done
give_up:
  %pause = mul i64 %waited, 8
  %until = add i64 %now, %pause
  store atomic i64 %until, ptr @alone_until monotonic, align 8
  br label %done
done:
  ret i1 %late
}
"""
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads")

# 2 to 4 us for one thread, where sharing costs 1.2: 64 KB took 1.0 us on one thread and 1.5 on two, 128 KB 4.0 and 4.2.
WORK_OF_A_THREAD = 64 * 1024
WORK_IN_REGION = 8 * 1024  # a barrier takes 0.14 us


def threads_for(programs: int, work: int, *, in_region: bool = False) -> int:
    """The most threads that a launch may have: as many as have a program each, and work enough.

    `work` is the launch's size in bytes moved, or an eighth of its FLOPs where that is more. `in_region`: it is one of many in
    one parallel region (recorded.py), where its threads are there already.
    """
    return max(1, min(programs, work // (WORK_IN_REGION if in_region else WORK_OF_A_THREAD)))


@once
def library() -> Any:
    """The functions `launch`, `now` and `late`, and the variable `limit`, the most threads that any launch may have."""
    return _load()


def _load() -> Any:
    openmp = _openmp()
    loaded = codegen.library(
        _IR,
        "llama_fast_launch",
        exports=("launch", "now", "late", "limit"),
        imports=openmp or dict.fromkeys(_OPENMP, 0),
    )
    if _forked or not openmp:
        _set_limit(loaded, 1)
    _loaded.append(loaded)
    return loaded


def _openmp() -> dict[str, int]:
    """The addresses of OpenMP's functions, of the library that PyTorch itself was linked with; empty if with none."""
    pytorch = ctypes.CDLL(torch._C.__file__)  # a symbol is looked for in it and then in what it was linked with
    try:
        return {name: ctypes.cast(getattr(pytorch, name), ctypes.c_void_p).value or 0 for name in _OPENMP}
    except AttributeError:
        return {}


_forked = False
_loaded: list[Any] = []


def _after_fork() -> None:
    global _forked
    _forked = True
    for loaded in _loaded:
        _set_limit(loaded, 1)


def _set_limit(loaded: Any, threads: int) -> None:
    ctypes.c_int32.from_address(loaded["limit"]).value = threads


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)
