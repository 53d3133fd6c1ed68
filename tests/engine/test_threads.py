"""Threads that share an engine: each gets the tokens it gets alone, whoever computed them, failed, or left."""

import itertools
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llama_fast.engine.llm import LLM
from llama_fast.engine.sampling import SamplingParams
from llama_fast.engine.turns import Turns
from tests.decoder.models import random_ids
from tests.engine.engines import DEVICE, assert_nothing_left, engine
from tests.parity import not_interpreted

pytestmark = not_interpreted

PROMPTS = [random_ids(length, seed=length) for length in (1, 3, 17, 5, 30, 45, 2, 8)]
EACH = [
    SamplingParams(temperature=0.0, max_tokens=20)
    if i % 2
    else SamplingParams(seed=i, temperature=0.9, top_p=0.9, frequency_penalty=0.2, max_tokens=12 + 3 * i)
    for i in range(len(PROMPTS))
]
TOO_LONG = 60  # seconds: whatever takes more waits for itself


@pytest.fixture(autouse=True)
def often():
    """Threads change often: what one does in the midst of another's step shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def alone(folder):
    llm = engine(folder("llama"), max_context=128)
    return [llm.generate(prompt, params)[0] for prompt, params in zip(PROMPTS, EACH, strict=True)]


@pytest.fixture(params=[False, True], ids=["read at once", "read late"])
def llm(request, folder):
    llm = engine(folder("llama"), read_late=request.param, max_context=128, max_batch=5, block_size=4, step_tokens=24)
    yield llm
    assert_nothing_left(llm)


def at_once(*works):
    """What each of `works` returns, or the error it raises, in threads of their own that start together."""
    start = threading.Barrier(len(works))

    def run(work):
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(run, work) for work in works]
        return [future.exception(TOO_LONG) or future.result() for future in futures]


def generating(llm, which, times=1):
    def work():
        found = [llm.generate([PROMPTS[i] for i in which], [EACH[i] for i in which]) for _ in range(times)]
        assert all(each == found[0] for each in found)
        return found[0]

    return work


def streaming(llm, i):
    def work():
        *pieces, last = llm.stream(PROMPTS[i], EACH[i])
        assert "".join(piece.text for piece in (*pieces, last)) == last.completion.text
        return last.completion

    return work


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_every_thread_gets_its_own_tokens(llm, alone):
    """Greedy and drawn, one prompt and several, whole and in pieces, with prefixes that others put into the cache."""
    one, several, again, *streams = at_once(
        generating(llm, [4], times=3), generating(llm, [0, 1, 2, 3, 7], times=2), generating(llm, [5, 6], times=2),
        *(streaming(llm, i) for i in range(8)),
    )  # fmt: skip
    assert one == [alone[4]] and several == [alone[i] for i in (0, 1, 2, 3, 7)] and again == alone[5:7]
    assert streams == alone


def test_streams_of_two_threads_read_in_turns(llm, alone):
    """Two in each thread: neither waits for what only the other could compute."""

    def both(i, j):
        streams = [llm.stream(PROMPTS[i], EACH[i]), llm.stream(PROMPTS[j], EACH[j])]
        last = {}
        while streams:
            for stream in list(streams):
                piece = next(stream, None)
                if piece is None:
                    streams.remove(stream)
                elif piece.completion is not None:
                    last[len(piece.completion.prompt_token_ids)] = piece.completion
        return [last[len(PROMPTS[i])], last[len(PROMPTS[j])]]

    assert at_once(lambda: both(2, 5), lambda: both(4, 7)) == [[alone[2], alone[5]], [alone[4], alone[7]]]


def test_who_waits_sees_every_step(folder, monkeypatch):
    """A thread that computes step after step does not keep the others from theirs."""
    llm = engine(folder("llama"), max_context=256)
    launch = llm._core.runner.launch
    # longer than a thread takes to come back for more on a busy machine
    monkeypatch.setattr(llm._core.runner, "launch", lambda *args: (time.sleep(0.005), launch(*args))[1])
    long, short = SamplingParams(temperature=0.0, max_tokens=200), SamplingParams(temperature=0.0, max_tokens=20)
    request = llm.submit(PROMPTS[3], long)

    def computes():
        while not request.done:
            llm.step()

    def waits():
        seen = []
        for _ in llm.stream(PROMPTS[4], short):
            seen.append(len(request.completion.token_ids))
        return seen

    _, seen = at_once(computes, waits)
    assert len(seen) > 1 and seen[-1] - seen[0] < 60  # one step each, or a few: the other one makes 200


def test_other_calls_come_between_steps(llm, alone):
    expected = llm.logits(PROMPTS[5])

    def others():
        for _ in range(20):
            llm.forget_prefixes()
            llm.use_fusions(llm.decoder.fusions)
            assert llm.logits(PROMPTS[5]).equal(expected)

    assert at_once(others, generating(llm, range(8)), others, streaming(llm, 6)) == [None, alone, None, alone[6]]


def test_requests_that_come_and_go(folder, alone):
    """From six threads, in a cache too small for them: submitted, watched, cancelled midway or read to their end."""
    llm = engine(folder("llama"), max_context=128, max_cache_tokens=160, block_size=4, max_batch=5, step_tokens=24)

    def work(seed):
        rng = random.Random(seed)
        for _ in range(8):
            i = rng.randrange(len(PROMPTS))
            request, until = llm.submit(PROMPTS[i], EACH[i]), rng.choice([0, 2, 9, 999])
            while not request.done and len(request.completion.token_ids) < until:
                llm.step()
            llm.cancel(request)
            assert request.done
            got = request.completion
            assert got.token_ids == alone[i].token_ids[: len(got.token_ids)]
            assert got == alone[i] or got.finish_reason == "cancelled"

    assert at_once(*(lambda seed=seed: work(seed) for seed in range(6))) == [None] * 6
    assert_nothing_left(llm)


# --- what goes wrong -------------------------------------------------------------------------------------------------


class DeviceFault(Exception):
    """What the tests throw into a step."""


def test_a_step_that_fails(llm, alone, monkeypatch):
    """The thread that computed it hears of it, and its requests end; those of the others are computed again."""
    launch, unlucky = llm._core._launch, []

    def failing(chunks):
        launched = launch(chunks)
        if threading.current_thread().name == "unlucky" and len(chunks) > 2:
            unlucky.append(len(chunks))
            raise DeviceFault
        return launched

    def fails():
        threading.current_thread().name = "unlucky"
        with pytest.raises(DeviceFault):
            generating(llm, [0, 1, 2, 3], times=50)()

    monkeypatch.setattr(llm._core, "_launch", failing)
    assert at_once(fails, generating(llm, [4, 5]), streaming(llm, 6), streaming(llm, 7)) == [
        None, alone[4:6], alone[6], alone[7],
    ]  # fmt: skip
    assert len(unlucky) == 1


def test_a_fault_that_lasts_reaches_every_thread(llm, monkeypatch):
    def failing(chunks):
        raise DeviceFault

    monkeypatch.setattr(llm._core, "_launch", failing)
    found = at_once(generating(llm, [4, 5]), streaming(llm, 6), generating(llm, [7]))
    assert [type(each) for each in found] == [DeviceFault] * 3


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01, 0.02, 0.04])
def test_an_interrupt_of_one_thread(delay, llm, alone):
    """Ctrl-C in the main thread, in its own step or while it waits for another's: the others go on."""
    main, found, inside = threading.get_ident(), [], []

    def others():
        found.append(at_once(generating(llm, [4, 5], times=3), streaming(llm, 6), streaming(llm, 7)))

    def interrupt():
        while not inside:
            time.sleep(1e-4)
        time.sleep(delay)
        signal.pthread_kill(main, signal.SIGINT)

    def goes_on():
        inside.append(True)
        generating(llm, [0, 1, 2, 3], times=10**6)()

    threads = [threading.Thread(target=work, daemon=True) for work in (others, interrupt)]
    for thread in threads:
        thread.start()
    with pytest.raises(KeyboardInterrupt):
        goes_on()
    for thread in threads:
        thread.join(TOO_LONG)
    assert found == [[alone[4:6], alone[6], alone[7]]]


def is_of_engine(code):
    return any(file in code.co_filename for file in ("/llama_fast/engine/", "/llama_fast/decoder/detokenizer.py"))


def interrupted_at(count, work, *, traced=is_of_engine):
    """Runs `work`, with a KeyboardInterrupt before the `count`-th line of the `traced` code in it; returns how many lines there were."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if not traced(frame.f_code):
            return None
        if event == "line":
            lines += 1
            if lines == count:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return lines


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.nightly) for part in (1, 2, 3))])
def test_an_interrupt_before_any_line(llm, alone, part):
    """The requests of others get their tokens and their text, and nothing is left of those that were interrupted."""
    ours = [
        SamplingParams(temperature=0.0, max_tokens=4, n=2, logprobs=1),
        SamplingParams(temperature=0.0, max_tokens=3),
    ]
    others = [2, 5, 6]

    def generates():
        llm.generate([PROMPTS[4], PROMPTS[1]], ours)

    lines = interrupted_at(0, generates)
    rng = random.Random(part)
    for _ in range(20):
        requests = [llm.submit(PROMPTS[i], EACH[i]) for i in others]
        interrupted_at(rng.randrange(1, 2 * lines), generates)
        for _ in range(400):
            llm.step()
        assert [request.done for request in requests] == [True] * len(others)
        assert [request.completion for request in requests] == [alone[i] for i in others]
        assert_nothing_left(llm)


def test_an_interrupt_of_a_stream_before_any_line_of_it(folder, alone):
    """It leaves no request that runs on, though nobody holds the stream any more."""
    llm = engine(folder("llama"), max_context=128)

    def lines_to_first_piece(interrupted):
        stream = llm.stream(PROMPTS[4], EACH[4])
        return interrupted_at(interrupted, lambda: next(stream), traced=LLM.stream.__code__.__eq__)

    lines = lines_to_first_piece(0)
    assert lines > 5
    for line in range(1, lines + 1):
        lines_to_first_piece(line)
        assert_nothing_left(llm)
    assert llm.generate(PROMPTS[4], EACH[4]) == alone[4:5]


def test_a_thread_that_leaves_its_stream(llm, alone):
    """Nobody reads it any more, and what it holds is given back when it is dropped, in whatever thread that is."""
    left = []

    def leaves():
        left.append(llm.stream(PROMPTS[5], EACH[5]))
        assert next(left[0]).text

    def drops():
        stream = llm.stream(PROMPTS[4], EACH[4])
        next(stream)
        del stream

    assert at_once(leaves, drops, generating(llm, [0, 1, 2])) == [None, None, alone[:3]]
    left.clear()
    assert llm.generate(PROMPTS[5], EACH[5]) == alone[5:6]


def test_a_stream_that_is_dropped_in_the_midst_of_a_step(llm, alone, monkeypatch):
    """As the garbage collector does it, wherever it pleases: the step must not wait for itself."""
    streams = [llm.stream(PROMPTS[i], EACH[i]) for i in (4, 5)]
    for stream in streams:
        next(stream)
    launch = llm._core._launch

    def dropping(chunks):
        while streams:
            streams.pop().close()
        return launch(chunks)

    monkeypatch.setattr(llm._core, "_launch", dropping)
    assert at_once(generating(llm, [6]), generating(llm, [7])) == [[alone[6]], [alone[7]]]


def test_a_stream_that_is_dropped_in_the_midst_of_another_call(llm, alone, monkeypatch):
    """It ends with that call: no step has to come."""
    stream = llm.stream(PROMPTS[4], EACH[4])
    next(stream)
    logits = llm.decoder.logits

    def dropping(hidden):
        stream.close()
        return logits(hidden)

    monkeypatch.setattr(llm.decoder, "logits", dropping)
    llm.logits(PROMPTS[5])
    assert_nothing_left(llm)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork") or DEVICE != "cpu", reason="a forked process has no GPU")
def test_a_forked_child_generates(folder, alone):
    """Of its parent it has neither the thread that computes nor those that stood in line, nor OpenMP's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    llm = engine(folder("llama"), max_context=128)
    llm.generate([list(range(3, 83))], EACH[1])  # wide enough for two threads
    forked, in_turn = threading.Event(), threading.Event()
    holders = [
        threading.Thread(target=lambda: llm._core.between_steps(lambda: (in_turn.set(), forked.wait(TOO_LONG)))),
        threading.Thread(target=lambda: llm.generate(PROMPTS[5], EACH[5])),
    ]
    holders[0].start()
    in_turn.wait(TOO_LONG)
    holders[1].start()
    child = os.fork()
    if child == 0:
        signal.alarm(TOO_LONG)
        same = llm.generate(PROMPTS, EACH) == alone and llm.generate([list(range(3, 83))], EACH[1])
        os._exit(0 if same else 1)
    forked.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for holder in holders:
        holder.join(TOO_LONG)
    torch.set_num_threads(threads)
    assert llm.generate(PROMPTS, EACH) == alone


def test_what_is_asked_for_is_checked_once(llm, monkeypatch):
    """When it is submitted: a step has the vocabulary of others to compute."""
    checked = []
    monkeypatch.setattr(SamplingParams, "check_vocabulary", lambda self, *_: checked.append(self))
    llm.generate(PROMPTS[4], EACH[4])
    assert checked == [EACH[4]]


def test_a_call_in_the_midst_of_a_step_is_refused(llm):
    """From a signal's handler, say. It could only wait for itself."""
    llm.on_phase = lambda _: llm.generate(PROMPTS[0])
    (error,) = at_once(lambda: llm.generate(PROMPTS[1], EACH[1]))
    assert isinstance(error, RuntimeError) and "in the midst of a step of this LLM" in str(error)
    llm.on_phase = None


# --- turns -----------------------------------------------------------------------------------------------------------


def test_turns_come_in_order():
    turns, order, go = Turns(), [], threading.Event()
    threads = [threading.Thread(target=lambda i=i: turns.take(lambda: order.append(i))) for i in range(8)]

    def first():
        for i, thread in enumerate(threads, 2):
            thread.start()
            while len(turns._line) < i:
                time.sleep(1e-4)
        go.wait(TOO_LONG)

    holder = threading.Thread(target=lambda: turns.take(first))
    holder.start()
    go.set()
    for thread in (holder, *threads):
        thread.join(TOO_LONG)
    assert order == list(range(8)) and not turns._line


def test_an_interrupt_before_any_line_of_a_turn_leaves_none_taken():
    code = Turns.take.__code__
    lines = interrupted_at(0, lambda: Turns().take(list), traced=code.__eq__)
    for line in range(1, lines + 1):
        turns = Turns()
        interrupted_at(line, lambda turns=turns: turns.take(list), traced=code.__eq__)
        assert turns.take(list) == [] and not turns._line


@pytest.mark.parametrize("seed", range(20))
def test_an_interrupt_leaves_no_turn_taken(seed):
    """Wherever it comes: every other thread still has its turn."""
    turns, main, counts, stop = Turns(), threading.get_ident(), [0, 0, 0], []

    def count(i):
        counts[i] += 1
        return not stop

    def interrupt():
        while not counts[2]:
            time.sleep(1e-4)
        time.sleep(2e-3 * random.Random(seed).random())
        signal.pthread_kill(main, signal.SIGINT)

    def works(i):
        return all(turns.take(lambda: count(i)) for _ in itertools.count())

    threads = [threading.Thread(target=works, args=(i,), daemon=True) for i in range(2)]
    threads.append(threading.Thread(target=interrupt))
    for thread in threads:
        thread.start()
    with pytest.raises(KeyboardInterrupt):
        works(2)
    before, deadline = list(counts), time.monotonic() + 10
    while any(now < then + 3 for now, then in zip(counts[:2], before[:2], strict=True)):
        assert time.monotonic() < deadline, "the turn of who was interrupted lasts"
        time.sleep(1e-3)
    stop.append(True)
    for thread in threads:
        thread.join(TOO_LONG)
    assert not turns._line
