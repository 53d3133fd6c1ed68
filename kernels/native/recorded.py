"""Many launches by one native call: what a CUDA graph is to a GPU.

    recording = Recording([[norm], [q_rope, k_rope], [attention]])     stages of launches (launch.py)
    recording.replay()                                                 0.05 us a launch on one thread
    recording.patch(2, 0, q.data_ptr())                                argument 0 of launch 2, from the next replay on

The launches of one stage need nothing of each other; a stage begins when the one before it has ended. All stages run
inside one parallel region: its threads meet at a barrier between two stages, unless thread 0 runs both alone.
"""

import ctypes
import functools
import itertools
import struct
import threading
from collections.abc import Sequence
from typing import Any

from . import codegen, threads
from .drivers import HEADER, SLOT_BYTES
from .launch import Launch
from .machine import host

# A recording is itself a launch, whose work function is `replay` and whose programs are the launches. Its arguments: the
# barrier's two counters, alone on their cache lines; then of every launch the address of its block, and whether all threads
# meet before it.
_BARRIER_BYTES = 256
_ENTRY = struct.Struct("<Qq")

# Long enough for the stages of a small model, which take 2 us each; where programs outnumber the cores, the thread that
# all wait for is the one that has none, and gets it when the others yield.
_SPINS = 300

_IR = r"""
%launch = type { ptr, i64, i32, i32, i32, i32, [0 x i64] }
%entry = type { ptr, i64 }
%recording = type { ptr, i64, i32, i32, i32, i32, [256 x i8], [0 x %entry] }
declare i32 @sched_yield()
declare i32 @llvm.smin.i32(i32, i32)
declare void @llvm.x86.sse2.pause()
declare void @llvm.aarch64.hint(i32)

define void @replay(ptr %recording, i32 %thread, i32 %threads) nounwind {
entry:
  %p_count = getelementptr %recording, ptr %recording, i64 0, i32 1
  %count = load i64, ptr %p_count
  %counters = getelementptr %recording, ptr %recording, i64 0, i32 6, i64 128
  %others = icmp sgt i32 %threads, 1
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %i_next, %next ]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %look, label %done
look:
  %p_launch = getelementptr %recording, ptr %recording, i64 0, i32 7, i64 %i
  %launch = load ptr, ptr %p_launch
  %p_meet = getelementptr %entry, ptr %p_launch, i64 0, i32 1
  %meet = load i64, ptr %p_meet
  %must = icmp ne i64 %meet, 0
  %wait = and i1 %must, %others
  br i1 %wait, label %before, label %start
before:
  call void @barrier(ptr %counters, i32 %threads)
  br label %start
start:
  %p_most = getelementptr %launch, ptr %launch, i64 0, i32 5
  %most = load i32, ptr %p_most
  %team = call i32 @llvm.smin.i32(i32 %most, i32 %threads)
  %member = icmp slt i32 %thread, %team
  br i1 %member, label %run, label %next
run:
  %work = load ptr, ptr %launch
  call void %work(ptr %launch, i32 %thread, i32 %team)
  br label %next
next:
  %i_next = add i64 %i, 1
  br label %loop
done:
  ret void
}

define internal void @barrier(ptr %counters, i32 %threads) nounwind noinline {
entry:
  %p_round = getelementptr i32, ptr %counters, i64 1
  %round = load atomic i32, ptr %p_round monotonic, align 4
  %before = atomicrmw add ptr %counters, i32 1 acq_rel
  %arrived = add i32 %before, 1
  %last = icmp eq i32 %arrived, %threads
  br i1 %last, label %open, label %look
open:
  store atomic i32 0, ptr %counters monotonic, align 4
  %next_round = add i32 %round, 1
  store atomic i32 %next_round, ptr %p_round release, align 4
  ret void
look:
  %spins = phi i32 [ 0, %entry ], [ %spins_next, %spin ], [ %spins, %yield ]
  %now = load atomic i32, ptr %p_round acquire, align 4
  %closed = icmp eq i32 %now, %round
  br i1 %closed, label %wait, label %done
wait:
  %patient = icmp ult i32 %spins, SPINS
  br i1 %patient, label %spin, label %yield
spin:
  call void PAUSE
  %spins_next = add i32 %spins, 1
  br label %look
yield:
  %ignored = call i32 @sched_yield()
  br label %look
done:
  ret void
}
"""


class Recording:
    """Launches that are replayed in order.

    `stages` are lists of launches; those of one stage may run at the same time, so none may read or write what another
    writes. Whoever records keeps the tensors alive, and does not replay while an earlier replay still runs elsewhere:
    the second waits.
    """

    def __init__(self, stages: Sequence[Sequence[Launch]]) -> None:
        self.launches = [launch for stage in stages for launch in stage]
        self._blocks = [_buffer(launch.block()) for launch in self.launches]
        meets = _meetings(stages)
        entries = [_ENTRY.pack(ctypes.addressof(block), meet) for block, meet in zip(self._blocks, meets, strict=True)]
        most = max((launch.threads for launch in self.launches), default=1)
        header = HEADER.pack(_library()["replay"], len(entries), 1, 1, 1, most)
        self._recording = _buffer(header + bytes(_BARRIER_BYTES) + b"".join(entries))
        self._lock = threading.Lock()

    def replay(self) -> None:
        """Runs all launches, on as many threads as the widest of them may have. Other Python threads go on meanwhile."""
        with self._lock:
            _launch()(ctypes.addressof(self._recording))

    def patch(self, launch: int, argument: int, value: float) -> None:
        """Another value for an argument of a launch, both by their place, from the next replay on."""
        slot = self.launches[launch].kernel.pack_one(argument, value)
        with self._lock:
            ctypes.memmove(
                ctypes.addressof(self._blocks[launch]) + HEADER.size + SLOT_BYTES * argument, slot, len(slot)
            )


def _meetings(stages: Sequence[Sequence[Launch]]) -> list[bool]:
    """For every launch, whether all threads meet before it: at the start of a stage that is not the first, and not where
    thread 0 alone runs this stage and the one before."""
    stages = [stage for stage in stages if stage]
    alone = [all(launch.threads <= 1 for launch in stage) for stage in stages]
    starts = [False, *(not (before and after) for before, after in itertools.pairwise(alone))]
    return [meet and i == 0 for stage, meet in zip(stages, starts, strict=False) for i in range(len(stage))]


def _buffer(content: bytes) -> Any:
    return ctypes.create_string_buffer(content, len(content))


@functools.cache
def _library() -> Any:
    machine = host()
    assert machine is not None
    pause = "@llvm.x86.sse2.pause()" if machine.is_x86 else "@llvm.aarch64.hint(i32 1)"
    ir = _IR.replace("PAUSE", pause).replace("SPINS", str(_SPINS))
    return codegen.library(ir, "llama_fast_replay", exports=("replay",))


@functools.cache
def _launch() -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(threads.library()["launch"])
