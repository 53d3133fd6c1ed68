"""Many launches by one native call: what a CUDA graph is to a GPU.

    recording = Recording([[norm], [q_rope, k_rope], [attention]])     stages of launches (launch.py)
    recording.replay()                                                 0.014 us a launch on one thread, 0.14 on two with a barrier
    recording.patch(2, 0, q.data_ptr())                                argument 0 of launch 2, from the next replay on
    recording.stamp(True)                                              replays also note when each stage begins:
    recording.stamps                                                   seconds, 4 for these 3 stages

The launches of one stage need nothing of each other; a stage begins when the one before it has ended. All stages run
inside one parallel region: its threads meet at a barrier between two stages, unless thread 0 runs both alone.
"""

import ctypes
import itertools
import os
import struct
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from . import codegen, threads
from .drivers import HEADER, SLOT_BYTES
from .launch import Kernel, Launch
from .machine import host
from .once import once

# A recording is itself a launch, whose work function is `replay` and whose programs are the launches. Its arguments: the
# barrier's counters, alone on their cache lines; then of every launch the address of its block, and whether all threads
# meet before it.
_BARRIER_BYTES = 256
_ENTRY = struct.Struct("<Qq")

# At a barrier threads spin: to yield at once cost 4 ms a barrier where other programs want the cores (104 launches: 290 ms,
# 0.03 on one thread). Who has waited too long (`late`, threads.py) then yields, and whoever opens that barrier sends
# the others home: thread 0 does the rest alone. The barrier's counters are {arrived, round, late}, and the lowest bit of
# a new round says whether the others go.
_IR = r"""
%launch = type { ptr, i64, i32, i32, i32, i32, [0 x i64] }
%entry = type { ptr, i64 }
%recording = type { ptr, i64, i32, i32, i32, i32, [256 x i8], [0 x %entry] }
%barrier = type { i32, i32, i32 }
declare i64 @now()
declare i1 @late(i64, i64, i64)
declare i32 @sched_yield()
declare i32 @llvm.smin.i32(i32, i32)
declare void @llvm.x86.sse2.pause()
declare void @llvm.aarch64.hint(i32)

define void @replay(ptr %recording, i32 %thread, i32 %all_threads) nounwind {
entry:
  %p_count = getelementptr %recording, ptr %recording, i64 0, i32 1
  %count = load i64, ptr %p_count
  %barrier = getelementptr %recording, ptr %recording, i64 0, i32 6, i64 128
  %start_time = call i64 @now()
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %i_next, %next ]
  %threads = phi i32 [ %all_threads, %entry ], [ %threads_now, %next ]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %look, label %done
look:
  %p_launch = getelementptr %recording, ptr %recording, i64 0, i32 7, i64 %i
  %launch = load ptr, ptr %p_launch
  %p_meet = getelementptr %entry, ptr %p_launch, i64 0, i32 1
  %meet = load i64, ptr %p_meet
  %must = icmp ne i64 %meet, 0
  %others = icmp sgt i32 %threads, 1
  %wait = and i1 %must, %others
  br i1 %wait, label %meeting, label %start
meeting:
  %leave = call i1 @meet(ptr %barrier, i32 %threads, i64 %i, i64 %start_time)
  %threads_left = select i1 %leave, i32 1, i32 %threads
  %stays = icmp slt i32 %thread, %threads_left
  br i1 %stays, label %start, label %done
start:
  %threads_now = phi i32 [ %threads, %look ], [ %threads_left, %meeting ]
  %p_most = getelementptr %launch, ptr %launch, i64 0, i32 5
  %most = load i32, ptr %p_most
  %team = call i32 @llvm.smin.i32(i32 %most, i32 %threads_now)
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

; waits for all threads, after so many launches; whether all but thread 0 are to leave
define internal i1 @meet(ptr %barrier, i32 %threads, i64 %launches, i64 %start_time) nounwind noinline {
entry:
  %p_round = getelementptr %barrier, ptr %barrier, i64 0, i32 1
  %p_late = getelementptr %barrier, ptr %barrier, i64 0, i32 2
  %round = load atomic i32, ptr %p_round monotonic, align 4
  %before = atomicrmw add ptr %barrier, i32 1 acq_rel
  %arrived = add i32 %before, 1
  %last = icmp eq i32 %arrived, %threads
  br i1 %last, label %open, label %look
open:
  %leave_now = atomicrmw xchg ptr %p_late, i32 0 monotonic
  store atomic i32 0, ptr %barrier monotonic, align 4
  %even = and i32 %round, -2
  %next_even = add i32 %even, 2
  %next_round = or i32 %next_even, %leave_now
  store atomic i32 %next_round, ptr %p_round release, align 4
  br label %done
look:
  %spins = phi i32 [ 0, %entry ], [ %spins_next, %spin ], [ 0, %clock ], [ 0, %give_up ]
  %arrival = phi i64 [ 0, %entry ], [ %arrival, %spin ], [ %arrival_known, %clock ], [ %arrival_known, %give_up ]
  %now_round = load atomic i32, ptr %p_round acquire, align 4
  %closed = icmp eq i32 %now_round, %round
  br i1 %closed, label %wait, label %opened
wait:
  %patient = icmp ult i32 %spins, 64
  br i1 %patient, label %spin, label %clock
spin:
  call void PAUSE
  %spins_next = add i32 %spins, 1
  br label %look
clock:
  %unknown = icmp eq i64 %arrival, 0
  %now = call i64 @now()
  %arrival_known = select i1 %unknown, i64 %now, i64 %arrival
  %late = call i1 @late_stage(i64 %start_time, i64 %launches, i64 %arrival_known)
  br i1 %late, label %give_up, label %look
give_up:
  store atomic i32 1, ptr %p_late monotonic, align 4
  %ignored = call i32 @sched_yield()
  br label %look
opened:
  %waited = icmp ne i64 %arrival, 0
  br i1 %waited, label %judge, label %done
judge:
  %judged = call i1 @late_stage(i64 %start_time, i64 %launches, i64 %arrival)
  br label %done
done:
  %final = phi i32 [ %next_round, %open ], [ %now_round, %opened ], [ %now_round, %judge ]
  %bit = and i32 %final, 1
  %leave = icmp ne i32 %bit, 0
  ret i1 %leave
}

; whether who waits since %arrival has waited too long for a stage, which took %launches'th part of the time until then
define internal i1 @late_stage(i64 %start_time, i64 %launches, i64 %arrival) nounwind {
  %now = call i64 @now()
  %elapsed = sub i64 %arrival, %start_time
  %stage = sdiv i64 %elapsed, %launches
  %begin = sub i64 %arrival, %stage
  %late = call i1 @late(i64 %begin, i64 %arrival, i64 %now)
  ret i1 %late
}
"""

# The time at which a stage begins is noted by a launch of its own, which thread 0 runs after the barrier, before its share of the
# stage; the others do not wait for it. A stamp is {seconds, nanoseconds} of CLOCK_MONOTONIC, which is `time.perf_counter`'s.
_STAMP_IR = """
declare i32 @clock_gettime(i32, ptr)
define internal void @program(ptr noalias %arguments, i32 %i0, i32 %i1, i32 %i2, i32 %n0, i32 %n1, i32 %n2) nounwind {
  %stamp = load ptr, ptr %arguments
  %ignored = call i32 @clock_gettime(i32 1, ptr %stamp)
  ret void
}
"""
_STAMP = struct.Struct("<qq")


class Recording:
    """Launches that are replayed in order.

    `stages` are lists of launches; those of one stage may run at the same time, so none may read or write what another
    writes. Whoever records keeps the tensors alive (`keep` is kept as long as the recording), and does not replay while an
    earlier replay still runs elsewhere: the second waits.

    Attributes:
        bytes: of memory that goes with the recording: `kept_bytes` of what it keeps, and the launches' arguments.
    """

    def __init__(self, stages: Sequence[Sequence[Launch]], *, keep: object = None, kept_bytes: int = 0) -> None:
        self._keep = keep
        self._stages = [stage for stage in stages if stage]
        self.launches = [launch for stage in self._stages for launch in stage]
        self._blocks = [_buffer(launch.block()) for launch in self.launches]
        self._plain = self._replayed = _sequence(self._stages, self._blocks)
        self.bytes = kept_bytes + sum(map(len, [*self._blocks, self._plain]))
        self._stamped: Any = None  # the same with a stamp before each stage, made when it is first asked for
        self._stamp_blocks: list[Any] = []
        self._stamps = _buffer(bytes(_STAMP.size * (len(self._stages) + 1)))
        self._lock = threading.Lock()
        _recordings.add(self)

    def replay(self) -> None:
        """Runs all launches, on as many threads as the widest of them may have. Other Python threads go on meanwhile."""
        with self._lock:
            _launch()(ctypes.addressof(self._replayed))

    def stamp(self, on: bool) -> None:
        """Whether replays note their `stamps` from the next one on. One costs 0.04 us."""
        with self._lock:
            if on and self._stamped is None:
                self._stamped = self._with_stamps()
            self._replayed = self._stamped if on else self._plain

    @property
    def stamps(self) -> list[float]:
        """When each stage of the last stamped replay began and the last one ended, on the clock of `time.perf_counter`; zeros before."""
        return [seconds + 1e-9 * nanoseconds for seconds, nanoseconds in _STAMP.iter_unpack(self._stamps.raw)]

    def _with_stamps(self) -> Any:
        start, stages, blocks = ctypes.addressof(self._stamps), list[Sequence[Launch]](), iter(self._blocks)
        for i, stage in enumerate([*self._stages, ()]):
            stamp = Launch(_stamp_kernel(), (1,), [start + _STAMP.size * i])
            stages.append([stamp, *stage])
            self._stamp_blocks += [_buffer(stamp.block()), *itertools.islice(blocks, len(stage))]
        return _sequence(stages, self._stamp_blocks)

    def patch(self, launch: int, argument: int, value: float) -> None:
        """Another value for an argument of a launch, both by their place, from the next replay on."""
        slot = self.launches[launch].kernel.pack_one(argument, value)
        with self._lock:
            ctypes.memmove(
                ctypes.addressof(self._blocks[launch]) + HEADER.size + SLOT_BYTES * argument, slot, len(slot)
            )


def _sequence(stages: Sequence[Sequence[Launch]], blocks: Sequence[Any]) -> Any:
    """The launch that runs the launches of all stages, whose blocks are these."""
    entries = [
        _ENTRY.pack(ctypes.addressof(block), meet) for block, meet in zip(blocks, _meetings(stages), strict=True)
    ]
    most = max((launch.threads for stage in stages for launch in stage), default=1)
    return _buffer(
        HEADER.pack(_library()["replay"], len(entries), 1, 1, 1, most) + bytes(_BARRIER_BYTES) + b"".join(entries)
    )


def _meetings(stages: Sequence[Sequence[Launch]]) -> list[bool]:
    """For every launch, whether all threads meet before it: at the start of a stage that is not the first, and not where
    thread 0 alone runs this stage and the one before."""
    alone = [all(launch.threads <= 1 for launch in stage) for stage in stages]
    starts = [False, *(not (before and after) for before, after in itertools.pairwise(alone))]
    return [meet and i == 0 for stage, meet in zip(stages, starts, strict=False) for i in range(len(stage))]


def _buffer(content: bytes) -> Any:
    return ctypes.create_string_buffer(content, len(content))


_recordings: weakref.WeakSet[Recording] = weakref.WeakSet()


def _after_fork() -> None:
    """Another thread of the parent may have been in the midst of a replay, and none is here."""
    for recording in _recordings:
        recording._lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)


@once
def _library() -> Any:
    machine = host()
    assert machine is not None
    pause = "@llvm.x86.sse2.pause()" if machine.is_x86 else "@llvm.aarch64.hint(i32 1)"
    clock = {name: threads.library()[name] for name in ("now", "late")}
    return codegen.library(_IR.replace("PAUSE", pause), "llama_fast_replay", exports=("replay",), imports=clock)


@once
def _stamp_kernel() -> Kernel:
    machine = host()
    assert machine is not None
    key = "llama_fast_stamp", machine
    code = codegen.cached(_STAMP_IR, *key) or codegen.compile_module(_STAMP_IR, *key, key=_STAMP_IR)
    return Kernel(code, "q")


@once
def _launch() -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(threads.library()["launch"])
