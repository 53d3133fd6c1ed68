"""Recordings: stages in order on any number of threads, arguments patched between replays, and no collapse beside others."""

import itertools
import os
import signal
import statistics
import subprocess
import sys
import threading
import time

import pytest
import torch

from llama_fast.kernels.native.launch import Launch
from llama_fast.kernels.native.recorded import Recording
from tests.kernels.native.handwritten import count_kernel, mirror_kernel, native, sleep_kernel
from tests.kernels.native.handwritten import four_threads as four_threads
from tests.parity import not_interpreted

pytestmark = [native, not_interpreted]


@pytest.fixture(scope="module")
def mirror():
    return mirror_kernel()


def mirrored(mirror, y, x, threads, add=1.0):
    return Launch(mirror, (len(x),), (y.data_ptr(), x.data_ptr(), add, 0.0), threads=threads)


def chain(mirror, a, b, threads):
    """Launches of `threads[i]` threads each, from a to b and back, as stages of one."""
    pairs = [(b, a) if i % 2 == 0 else (a, b) for i in range(len(threads))]
    return [[mirrored(mirror, y, x, most)] for (y, x), most in zip(pairs, threads, strict=True)]


@pytest.mark.parametrize(
    "threads", [[1] * 100, [4] * 100, [2] * 100, [1, 4] * 50, [1, 1, 3, 4] * 25, [4, 1, 1, 1] * 25]
)
def test_a_stage_sees_all_that_the_stage_before_wrote(mirror, threads, four_threads):
    a, b = torch.arange(64.0), torch.zeros(64)
    recording = Recording(chain(mirror, a, b, threads))
    for times in range(1, 51):
        recording.replay()
        assert torch.equal(a, torch.arange(64.0) + 100 * times)
        time.sleep(0.0005)


def test_each_program_of_each_launch_runs_once_a_replay(four_threads):
    count = count_kernel()
    counts = torch.zeros(6, 50, dtype=torch.int64)
    numbers = torch.zeros_like(counts)
    launches = [
        Launch(count, (n,), (counts[i].data_ptr(), numbers[i].data_ptr()), threads=most)
        for i, (n, most) in enumerate([(50, 4), (1, 1), (0, 4), (50, 1), (3, 4), (50, 2)])
    ]
    recording = Recording([launches[:2], [], launches[2:5], launches[5:]])
    shared = False
    until = time.monotonic() + 20
    replays = 0
    while replays < 100 or (not shared and time.monotonic() < until):
        recording.replay()
        replays += 1
        shared |= len(numbers[0].unique()) == 4
        assert (numbers[1][0], numbers[3].unique().tolist()) == (threading.get_native_id(), [threading.get_native_id()])
        time.sleep(0.0005)
    assert shared
    assert counts.sum(1).tolist() == [each * replays for each in (50, 1, 0, 50, 3, 50)]
    assert counts[0].unique().tolist() == [replays]


def test_launches_of_one_stage_do_not_wait_for_each_other(mirror, four_threads):
    """They are right all the same: none reads what another writes."""
    xs, ys = torch.arange(64.0).repeat(10, 1), torch.zeros(10, 64)
    recording = Recording([[mirrored(mirror, y, x, 4) for y, x in zip(ys, xs, strict=True)]])
    recording.replay()
    assert torch.equal(ys, xs.flip(1) + 1)


def test_arguments_are_patched_between_replays(mirror):
    x, y, z = torch.arange(5.0), torch.zeros(5), torch.zeros(5)
    recording = Recording([[mirrored(mirror, y, x, 1)], [mirrored(mirror, z, y, 1)]])
    recording.replay()
    assert torch.equal(z, x + 2)
    other, result = x + 100, torch.zeros(5)
    recording.patch(0, 1, other.data_ptr())
    recording.patch(1, 0, result.data_ptr())
    recording.patch(1, 2, 0.5)
    recording.patch(1, 3, -0.25)
    recording.replay()
    assert torch.equal(result, x + 101.25) and torch.equal(z, x + 2)


def test_a_recording_of_nothing():
    Recording([]).replay()
    Recording([[], []]).replay()


@pytest.mark.parametrize("threads", [[1] * 6, [4] * 6, [1, 4, 1, 1, 3, 4]])
def test_a_stamped_replay_says_when_each_stage_began(mirror, threads, four_threads):
    a, b = torch.arange(64.0), torch.zeros(64)
    stages = chain(mirror, a, b, threads)
    recording = Recording([*stages[:2], [], *stages[2:]])
    recording.replay()
    assert recording.stamps == [0.0] * 7
    recording.stamp(True)
    for times in range(2, 20):
        before = time.perf_counter()
        recording.replay()
        stamps = recording.stamps
        assert before <= stamps[0] and sorted(stamps) == stamps and stamps[-1] <= time.perf_counter()
        assert torch.equal(a, torch.arange(64.0) + 6 * times)
    recording.patch(5, 2, 11.0)  # what the last launch adds
    recording.replay()
    assert torch.equal(a, torch.arange(64.0) + 6 * times + 5 + 11)
    recording.stamp(False)
    stamps = recording.stamps
    recording.replay()
    assert recording.stamps == stamps


def test_a_stage_that_takes_longer_has_the_longer_time(mirror, four_threads):
    sizes = (1000, 200_000, 10)
    pairs = [(torch.zeros(size), torch.zeros(size)) for size in sizes]
    recording = Recording([[mirrored(mirror, y, x, 4)] for y, x in pairs])
    recording.stamp(True)
    taken = []
    for _ in range(20):
        recording.replay()
        taken.append([after - before for before, after in itertools.pairwise(recording.stamps)])
    first, second, third = (min(each) for each in zip(*taken, strict=True))
    assert second > 10 * first > 10 * third


def test_replays_from_many_python_threads_take_turns(mirror, four_threads):
    a, b = torch.arange(64.0), torch.zeros(64)
    recording = Recording(chain(mirror, a, b, [4] * 10))
    workers = [threading.Thread(target=lambda: [recording.replay() for _ in range(100)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert torch.equal(a, torch.arange(64.0) + 10 * 400)


def test_a_forked_child_replays_what_the_parent_was_replaying():
    recording = Recording([[Launch(sleep_kernel(), (1,), (500_000,))]])
    worker = threading.Thread(target=recording.replay)
    worker.start()
    time.sleep(0.1)
    child = os.fork()
    if not child:
        signal.alarm(20)  # ends a child that hangs
        recording.replay()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    worker.join()


def test_more_threads_than_cores_do_not_collapse(mirror):
    """A barrier whose last thread has no core: waiting for it at every stage took 4 ms a stage, 400 ms a replay."""
    before = torch.get_num_threads()
    torch.set_num_threads(16)
    try:
        a, b = torch.arange(64.0), torch.zeros(64)
        recording = Recording(chain(mirror, a, b, [16] * 100))
        begin = time.perf_counter()
        for _ in range(200):
            recording.replay()
        assert torch.equal(a, torch.arange(64.0) + 100 * 200)
        assert (time.perf_counter() - begin) / 200 < 0.02  # 0.2 ms beside six busy programs
    finally:
        torch.set_num_threads(before)


@pytest.mark.nightly
def test_beside_two_busy_loops_a_replay_takes_at_most_three_times_as_long(mirror):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    busy = []
    try:
        a, b = torch.arange(2000.0), torch.zeros(2000)
        recording = Recording(chain(mirror, a, b, [2] * 26))
        quiet = median_time(recording.replay)
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        time.sleep(0.5)
        assert median_time(recording.replay) < 3 * quiet
    finally:
        for process in busy:
            process.kill()
        torch.set_num_threads(before)


def median_time(function):
    times = []
    until = time.perf_counter() + 3
    while time.perf_counter() < until:
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
