"""The book of blocks and the scheduler at their edges, and a run in which everything happens to many requests."""

import contextlib
import random

import pytest

from llama_fast.engine.cache import BlockPool, block_keys
from llama_fast.engine.sampling import SamplingParams
from llama_fast.engine.scheduler import Scheduler, Sequence
from tests.decoder.models import make, random_ids, save
from tests.engine.engines import Watch, assert_nothing_left, engine
from tests.parity import not_interpreted

pytestmark = not_interpreted

# --- blocks ----------------------------------------------------------------------------------------------------------


def test_sequences_grow_into_neighbours():
    """So that the CPU reads a sequence's keys without a copy."""
    pool = BlockPool(48, 4, neighbours=True)
    for _ in range(3):  # also in blocks that others have given back, and that are still known
        ours, theirs = [pool.take()], [pool.take()]
        for _ in range(5):
            ours.append(pool.take(ours[-1]))
            theirs.append(pool.take(theirs[-1]))
        for blocks in (ours, theirs):
            assert blocks == list(range(blocks[0], blocks[0] + 6))
        for block in ours:
            pool.publish(block, bytes([block]))
        pool.release(ours)
        pool.release(theirs)


def test_blocks_are_taken_once_and_given_back_once():
    pool = BlockPool(16, 4)
    taken = [pool.take() for _ in range(16)]
    assert sorted(taken) == list(range(16))
    with pytest.raises(AssertionError, match="no block is free"):
        pool.take()
    pool.release(taken)
    assert pool.free == 16
    with pytest.raises(AssertionError, match="released more often than taken"):
        pool.release([3])


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 8])
def test_every_block_can_be_taken(blocks):
    pool = BlockPool(blocks, 4)
    assert sorted(pool.take() for _ in range(blocks)) == list(range(blocks))


def test_keys_stand_for_all_tokens_before():
    keys = block_keys([1, 2, 3, 4, 5, 6, 7], 2)
    assert len(keys) == 3 == len(set(keys))  # the last token fills no block
    assert block_keys([1, 2, 3, 4], 2) == keys[:2]
    assert block_keys([9, 2, 3, 4], 2)[1] != keys[1]
    assert block_keys([5, 6], 2, keys[1]) == keys[2:]
    assert block_keys([1, 1], 1)[0] != block_keys([1, 1], 1)[1]
    assert block_keys([1], 2) == block_keys([], 2) == []


def test_known_blocks():
    pool = BlockPool(4, 2)
    keys = block_keys([1, 2, 3, 4, 5, 6], 2)
    first = [pool.take() for _ in range(3)]
    for block, key in zip(first, keys, strict=True):
        pool.publish(block, key)
    assert pool.reuse(keys[:2]) == first[:2]  # beside their first user
    pool.release(first)
    assert pool.free == 2  # the third, and the one that was never used
    pool.release(first[:2])
    assert pool.free == 4 and pool.reuse(keys) == first and pool.free == 1  # known without a user
    pool.release(first)
    assert pool.reuse([keys[1], b"unknown"]) == first[1:2] and pool.reuse([b"unknown", keys[0]]) == []
    pool.release(first[1:2])
    # what is taken is forgotten: unknown blocks first, then ends before beginnings
    assert pool.take() not in first
    assert pool.take() == first[2] and pool.reuse(keys) == first[:2]


def test_a_known_neighbour_is_not_taken_before_it_must():
    pool = BlockPool(4, 2)
    blocks = [pool.take()]
    blocks.append(pool.take(blocks[0]))
    (key,) = block_keys([1, 2], 2)
    pool.publish(blocks[1], key)
    pool.release(blocks[1:])
    assert pool.take(blocks[0]) != blocks[1] and pool.reuse([key]) == blocks[1:]


def test_the_first_of_two_equal_blocks_stays_known():
    pool = BlockPool(4, 2)
    (key,) = block_keys([1, 2], 2)
    first, second = pool.take(), pool.take()
    pool.publish(first, key)
    pool.publish(second, key)
    pool.release([second])
    pool.take(first)
    assert pool.reuse([key]) == [first]


# --- steps -----------------------------------------------------------------------------------------------------------


def scheduler(blocks=8, block_size=4, max_batch=4, step_tokens=16):
    return Scheduler(BlockPool(blocks, block_size), max_batch=max_batch, step_tokens=step_tokens)


def queued(scheduler, *prompts, max_tokens=20):
    sequences = [Sequence(list(range(length)), max_tokens, reuse_prefix=False) for length in prompts]
    for sequence in sequences:
        scheduler.add(sequence)
    return sequences


def step(scheduler, token=7):
    """A step as (which sequence, start, end, samples) in order, its tokens read at once."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        if chunk.samples:
            chunk.sequence.output.append(token)
    scheduler.publish(chunks)
    return [(chunk.sequence, chunk.start, chunk.end, chunk.samples) for chunk in chunks]


def test_prompts_in_chunks_beside_decoding():
    s = scheduler(blocks=20)
    a, b, c = queued(s, 3, 30, 5)
    assert step(s) == [(a, 0, 3, True), (b, 0, 13, False)]
    assert step(s) == [(a, 3, 4, True), (b, 13, 28, False)]
    # rows of one token stand first; what is left of the budget goes to the next in the queue
    assert step(s) == [(a, 4, 5, True), (b, 28, 30, True), (c, 0, 5, True)]
    assert step(s) == [(a, 5, 6, True), (b, 30, 31, True), (c, 5, 6, True)]
    assert [len(x.blocks) for x in (a, b, c)] == [2, 8, 2]
    assert len({x.row for x in (a, b, c)}) == 3


def test_a_long_prompt_does_not_hold_up_decoding():
    """Not even that of an older sequence, which was let in later (one of several outputs, say)."""
    s = scheduler(blocks=20)
    older, younger = (Sequence(list(range(length)), 20, reuse_prefix=False) for length in (40, 3))
    s.add(younger)
    step(s)
    s.add(older)
    assert step(s) == [(younger, 3, 4, True), (older, 0, 15, False)]
    assert step(s) == [(younger, 4, 5, True), (older, 15, 30, False)]


def test_nothing_to_do():
    s = scheduler()
    assert s.idle and s.schedule() == []
    (a,) = queued(s, 3, max_tokens=1)
    assert not s.idle
    step(s)
    assert s.schedule() == []  # all its tokens are there; the engine ends it
    s.finish(a)
    assert s.idle and s.pool.free == 8


def test_no_more_rows_than_the_batch():
    s = scheduler(blocks=20, max_batch=2)
    a, b, c = queued(s, 1, 1, 1)
    assert [x for x, *_ in step(s)] == [a, b]
    s.finish(a)
    assert [x for x, *_ in step(s)] == [b, c] and c.row != b.row


def test_the_last_to_arrive_is_preempted_and_is_the_first_to_come_back():
    s = scheduler(blocks=4)
    a, b, c = queued(s, 7, 4, 4, max_tokens=9)
    assert [x for x, *_ in step(s)] == [a, b, c] and s.pool.free == 0
    assert [x for x, *_ in step(s)] == [a, b] and list(s.waiting) == [c]  # b took the block that c lost
    assert (c.blocks, c.computed, c.output) == ([], 0, [7])
    (d,) = queued(s, 1, max_tokens=1)
    assert [x for x, *_ in step(s)] == [a] and list(s.waiting) == [b, c, d]  # none is let in where one was sent away
    assert [x for x, *_ in step(s)] == [a] and list(s.waiting) == [b, c, d]
    s.finish(a)
    assert step(s) == [(b, 0, 6, True), (c, 0, 5, True)]
    assert [x for x, *_ in step(s)] == [b, c] and list(s.waiting) == [d]


def test_a_sequence_that_preempts_itself():
    """The youngest finds no block: it is the one to go."""
    s = scheduler(blocks=2)
    a, b = queued(s, 1, 4, max_tokens=4)
    assert [x for x, *_ in step(s)] == [a, b] and s.pool.free == 0
    assert step(s) == [(a, 1, 2, True)] and list(s.waiting) == [b] and s.pool.free == 1


def test_a_preempted_sequence_waits_until_its_token_is_read():
    s = scheduler(blocks=3)
    a, b = queued(s, 5, 3, max_tokens=4)
    s.schedule()
    a.pending = b.pending = 1
    s.preempt(b)
    assert b.known == 4 and [chunk.sequence for chunk in s.schedule()] == [a]
    assert list(s.waiting) == [b]
    b.pending = 0
    b.output.append(7)
    assert [(c.sequence, c.start, c.end) for c in s.schedule()] == [(b, 0, 4)]


def test_tokens_that_only_the_device_knows():
    (a,) = queued(scheduler(), 3)
    a.output, a.pending, a.row = [8, 9], 1, 2
    assert a.span(1, 6) == [1, 2, 8, 9, -3] and a.span(5, 6) == [-3] and a.span(3, 4) == [8]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_finish_in_any_state(steps):
    s = scheduler(step_tokens=4)
    sequences = queued(s, 2, 9, 3)
    for _ in range(steps):
        step(s)
    for sequence in sequences:
        s.finish(sequence)
        s.finish(sequence)
    assert s.idle and s.pool.free == 8 and sorted(s._free_rows) == [0, 1, 2, 3]


def test_rebuild():
    """After a step that failed: all compute again what they have read, in the order of their arrival, whatever it left behind."""
    s = scheduler(blocks=20)
    a, b, c = queued(s, 3, 30, 5)
    for _ in range(3):
        step(s)
    s.schedule()
    a.pending = b.pending = 1
    s.running.remove(b)  # interrupted before its row and its blocks were free
    s._free_rows.pop()
    s.rebuild([c, b, a])
    assert list(s.waiting) == [a, b, c] and s.pool.free == 20 and not s.running
    assert not any(s.pool._users) and sorted(s._free_rows) == list(range(s.max_batch))
    assert [x.pending for x in (a, b, c)] == [0, 0, 0]
    assert step(s) == [(a, 0, 6, True), (b, 0, 10, False)]


def test_shared_blocks_outlive_one_of_their_users():
    s = scheduler()
    first, second = (Sequence(list(range(9)), 4) for _ in range(2))
    s.add(first)
    step(s)
    s.add(second)
    assert step(s) == [(first, 9, 10, True), (second, 8, 9, True)]
    assert second.blocks[:2] == first.blocks[:2] and second.reused == 8 and s.pool.free == 8 - 4
    s.finish(first)
    assert s.pool.free == 5
    assert step(s) == [(second, 9, 10, True)]


def test_a_prompt_that_waits_is_hashed_once(monkeypatch):
    hashed = []
    monkeypatch.setattr(
        "llama_fast.engine.scheduler.block_keys",
        lambda tokens, *rest: hashed.extend(tokens) or block_keys(tokens, *rest),
    )
    s = scheduler()
    first, second = Sequence(list(range(20)), 4), Sequence(list(range(50, 70)), 4)
    s.add(first)
    s.add(second)
    for _ in range(3):
        step(s)
    assert s.waiting[0] is second and hashed == [*range(16), *range(50, 66), *range(16, 20)]
    s.finish(first)
    assert step(s) == [(second, 0, 16, False)] and len(hashed) == 36
    s.preempt(second)
    assert step(s) == [(second, 16, 20, True)] and second.reused == 16


# --- everything at once ----------------------------------------------------------------------------------------------


class DeviceFault(Exception):
    """What the tests throw into a step."""


def random_request(rng: random.Random):
    prompt = random_ids(16, seed=rng.randrange(3))[: rng.randrange(1, 17)] + random_ids(
        rng.randrange(9), seed=rng.randrange(9999)
    )
    options = dict(max_tokens=rng.choice([0, 1, 5, 12, 20]), n=rng.choice([1, 1, 1, 2]))
    if rng.random() < 0.5:
        options |= dict(temperature=0.0)
    else:
        options |= dict(
            seed=rng.randrange(99), temperature=1.5, top_k=rng.choice([0, 9]), frequency_penalty=rng.choice([0, 0.5])
        )
    if rng.random() < 0.3:
        options |= dict(stop_token_ids=random_ids(20, seed=5), min_tokens=min(3, options["max_tokens"]))
    if rng.random() < 0.2:
        options |= dict(logprobs=2, prompt_logprobs=1)
    return prompt, SamplingParams(**options)


def check_blocks(llm):
    """Each block has as many users as there are running sequences that list it, and is free if there are none."""
    used = [block for sequence in llm._core.scheduler.running for block in sequence.blocks]
    assert [used.count(block) for block in range(llm._core.runner.cache.blocks)] == llm._core.scheduler.pool._users
    assert llm._core.scheduler.pool.free == llm._core.scheduler.pool._users.count(0)
    assert all(not sequence.blocks for sequence in llm._core.scheduler.waiting)


@pytest.mark.parametrize("count", [120, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])
def test_many_requests_with_faults(late, count, tmp_path, monkeypatch):
    """Random requests in a cache too small for them, of which some are cancelled, on a device that fails now and then."""
    rng = random.Random(11 + late)
    folder = save(make(), tmp_path)
    llm = engine(folder, max_cache_tokens=96, block_size=4, max_batch=6, step_tokens=24, read_late=late)
    watch, launch, faults = Watch(llm), llm._core._launch, []

    def failing(chunks):
        fails, when = rng.random() < 0.04, rng.random()
        launched = None if fails and when < 0.5 else launch(chunks)
        if fails:
            faults.append(len(watch.steps))
            raise DeviceFault
        return launched

    monkeypatch.setattr(llm._core, "_launch", failing)
    asked = [random_request(rng) for _ in range(count)]
    requests, cancelled = [], set()
    while len(requests) < len(asked) or not all(request.done for request in requests):
        assert len(watch.steps) < 5000, "some request does not end"
        for prompt, params in asked[len(requests) :][: rng.randrange(3)]:
            requests.append(llm.submit(prompt, params))
        if requests and rng.random() < 0.2:
            cancelled.add(chosen := rng.randrange(max(0, len(requests) - 9), len(requests)))
            llm.cancel(requests[chosen])
        with contextlib.suppress(DeviceFault):
            llm.step()
        check_blocks(llm)
    assert_nothing_left(llm)
    cut = [
        i
        for i, request in enumerate(requests)
        if any(o.finish_reason == "cancelled" for o in request.completion.outputs)
    ]
    assert set(cut) <= cancelled
    # everything did happen
    reused = sum(sequence.reused > 0 for request in requests for sequence in request.sequences)
    assert len(cut) > count // 10 and len(faults) > 3 and watch.preemptions > count // 10 and reused > count // 4

    alone = engine(folder)
    for i, (request, (prompt, params)) in enumerate(zip(requests, asked, strict=True)):
        expected = alone.generate(prompt, params)[0]
        for ours, theirs in zip(request.completion.outputs, expected.outputs, strict=True):
            if i in cut and ours.finish_reason == "cancelled":
                assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)]
            else:
                assert (ours.token_ids, ours.text, ours.finish_reason) == (
                    theirs.token_ids,
                    theirs.text,
                    theirs.finish_reason,
                )
            assert ours.logprobs is None or len(ours.logprobs) == len(ours.token_ids)
        if params.prompt_logprobs is not None and i not in cut:
            assert [entry.token_id for entry in request.completion.prompt_logprobs] == prompt[1:]
