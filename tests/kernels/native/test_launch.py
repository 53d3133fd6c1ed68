"""Launches of kernels written by hand: each program once, on PyTorch's threads, from many Python threads and in a forked child."""

import ctypes
import gc
import math
import os
import signal
import threading
import time

import pytest
import torch

from llama_fast.kernels.native import threads as openmp
from llama_fast.kernels.native.launch import Fill, Launch
from llama_fast.kernels.native.threads import WORK_OF_A_THREAD, threads_for
from tests.kernels.native.handwritten import count_kernel, mirror_kernel, native, sleep_kernel
from tests.kernels.native.handwritten import four_threads as four_threads
from tests.parity import not_interpreted

pytestmark = [native, not_interpreted]


@pytest.fixture(scope="module")
def count():
    return count_kernel()


@pytest.fixture(scope="module")
def mirror():
    return mirror_kernel()


def zeros(programs):
    return torch.zeros(programs + 1, dtype=torch.int64), torch.zeros(programs + 1, dtype=torch.int64)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "grid", [(0,), (1,), (7,), (1000,), (3, 5), (1, 9), (9, 1), (0, 3), (2, 3, 4), (1, 1, 7), (5, 1, 3)]
)
def test_each_program_runs_once(count, grid, threads, four_threads):
    counts, numbers = zeros(math.prod(grid))
    for times in (1, 2, 3):
        Launch(count, grid, (counts.data_ptr(), numbers.data_ptr()), threads=threads).function()()
        assert counts[:-1].tolist() == [times] * math.prod(grid) and counts[-1] == 0


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_the_programs_are_shared_by_so_many_threads(count, threads, four_threads):
    """Not at every launch: a machine that is busy gives all to one thread for a while."""
    counts, numbers = zeros(400)
    run = Launch(count, (400,), (counts.data_ptr(), numbers.data_ptr()), threads=threads).function()
    until = time.monotonic() + 20
    while len(numbers[:-1].unique()) != threads and time.monotonic() < until:
        run()
        time.sleep(0.001)
    ran, shares = numbers[:-1].unique_consecutive(return_counts=True)
    assert len(ran) == threads and shares.max() - shares.min() <= 1


def test_torch_set_num_threads_holds(count, four_threads):
    counts, numbers = zeros(400)
    run = Launch(count, (400,), (counts.data_ptr(), numbers.data_ptr()), threads=4).function()
    run()
    torch.set_num_threads(1)
    for _ in range(20):
        run()
        assert numbers[:-1].unique().tolist() == [threading.get_native_id()]


def test_each_letter_is_read_as_its_type(mirror):
    x, y = torch.arange(5.0), torch.zeros(5)
    Launch(mirror, (5,), (y.data_ptr(), x.data_ptr(), 0.5, -8.25)).function()()
    assert y.tolist() == [x - 7.75 for x in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize("release_gil", [False, True])
def test_a_call_fills_slots_in_the_order_it_is_given(mirror, release_gil):
    x, y = torch.arange(5.0), torch.zeros(5)
    run = Launch(mirror, (5,), (0, 0, 1.0, 0.0)).function([Fill(1, 0), Fill(0, 2)], tensors=3, release_gil=release_gil)
    for each in (x, x + 10):
        assert run(each, None, y) is None
        assert y.tolist() == (each + 1).flip(0).tolist()


def test_an_address_may_lie_behind_the_start_of_a_tensor(mirror):
    both = torch.arange(10.0)
    run = Launch(mirror, (5,), (0, 0, 1.0, 0.0)).function([Fill(0, 0, 5 * 4), Fill(1, 0)], tensors=1)
    run(torch.nn.Parameter(both))
    assert both.tolist() == [0, 1, 2, 3, 4, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("values", [(), (0,), (0, 0, 0), (0, 0), (0, "x"), (0, None), (0, torch.Tensor)])
def test_a_call_with_other_values_is_an_error_and_runs_nothing(count, values):
    counts, _ = zeros(3)
    fills = [Fill(0, 0), Fill(1, 1)]
    run = Launch(count, (3,), (counts.data_ptr(), counts.data_ptr())).function(fills, tensors=2)
    with pytest.raises(TypeError, match="takes tensors" if len(values) == 2 else "more or fewer tensors"):
        run(*(counts if value == 0 and len(values) == 2 and i == 0 else value for i, value in enumerate(values)))
    with pytest.raises(TypeError, match="keyword"):
        run(counts, counts=counts)
    assert counts.sum() == 0


def test_a_function_keeps_the_code():
    counts, numbers = zeros(3)
    run = Launch(count_kernel(), (3,), (counts.data_ptr(), numbers.data_ptr())).function()
    gc.collect()
    run()
    assert counts[:-1].tolist() == [1] * 3


def test_many_python_threads_launch_one_function_at_once(mirror, four_threads):
    """Each call has its own copy of the arguments."""
    run = Launch(mirror, (64,), (0, 0, 1.0, 0.0), threads=2).function([Fill(0, 0), Fill(1, 1)], tensors=2)
    wrong = []

    def work(start):
        x, y = torch.full((64,), float(start)), torch.zeros(64)
        for _ in range(300):
            y.zero_()
            run(y, x)
            if (y != start + 1).any():
                wrong.append(y)

    workers = [threading.Thread(target=work, args=(start,)) for start in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("release_gil", [True, False])
def test_other_threads_go_on_only_without_the_gil(release_gil):
    run = Launch(sleep_kernel(), (3,), (200_000,)).function(release_gil=release_gil)  # 0.6 s
    gaps = [0.0]
    stop = threading.Event()

    def tick():
        last = time.monotonic()
        while not stop.is_set():
            now = time.monotonic()
            gaps.append(max(gaps.pop(), now - last))
            last = now

    ticker = threading.Thread(target=tick)
    ticker.start()
    time.sleep(0.05)
    run()
    stop.set()
    ticker.join()
    assert (gaps[0] < 0.5) == release_gil


@pytest.mark.parametrize("threads", [1, 4])
def test_a_forked_child_launches_on_one_thread(count, threads, four_threads):
    """The threads of OpenMP are not there, and OpenMP would wait for them."""
    counts, numbers = zeros(400)
    run = Launch(count, (400,), (counts.data_ptr(), numbers.data_ptr()), threads=threads).function()
    for _ in range(50):
        run()
        time.sleep(0.001)
    child = os.fork()
    if not child:
        signal.alarm(20)  # ends a child that hangs
        for _ in range(50):
            run()
        alone = numbers[:-1].unique().tolist() == [threading.get_native_id()]
        os._exit(0 if alone and counts[:-1].tolist() == [100] * 400 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    run()
    assert counts[:-1].tolist() == [51] * 400


def test_where_pytorch_has_no_openmp_a_launch_runs_on_one_thread(count, four_threads, monkeypatch):
    monkeypatch.setattr(openmp, "_openmp", dict)
    library = openmp._load()
    counts, numbers = zeros(400)
    block = Launch(count, (400,), (counts.data_ptr(), numbers.data_ptr()), threads=4).block()
    for _ in range(20):
        ctypes.CFUNCTYPE(None, ctypes.c_char_p)(library["launch"])(block)
    assert counts[:-1].tolist() == [20] * 400 and numbers[:-1].unique().tolist() == [threading.get_native_id()]


def test_threads_for_small_work_is_one():
    assert threads_for(1000, WORK_OF_A_THREAD) == 1
    assert threads_for(1000, 2 * WORK_OF_A_THREAD) == 2
    assert threads_for(3, 100 * WORK_OF_A_THREAD) == 3
    assert threads_for(1, 10**12) == 1
    assert threads_for(0, 0) == 1
