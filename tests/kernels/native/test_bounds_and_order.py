"""Masks that are no plain prefixes, order of reads and writes, and integers at their limits: where a compiler is wrong in silence."""

import threading
import time

import pytest
import torch

from llama_fast import native
from llama_fast.kernels.native.machine import host
from llama_fast.kernels.triton_compat import HAS_TRITON, tl, triton
from tests.parity import not_interpreted

pytestmark = [not_interpreted, pytest.mark.skipif(not HAS_TRITON or host() is None, reason="no native kernels here")]

B = 16
ROWS, COLUMNS = torch.arange(B)[:, None], torch.arange(B)[None, :]


def launch(kernel, *arguments, **constants):
    native.launch(kernel, (1,), *arguments, **constants)


@triton.jit
def store_where_kernel(p_out, M, MODE: tl.constexpr, BLOCK: tl.constexpr):
    o_r, o_c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    if MODE == 0:
        mask = o_r <= o_c
    elif MODE == 1:
        mask = (o_r < M) & (o_c >= 1)
    else:
        mask = (o_r >= 1) & (o_c < M)
    tl.store(p_out + o_r * BLOCK + o_c, 1.0, mask=mask)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_rows_are_stored_wherever_a_mask_is_true(mode):
    """A mask that is false in the first column or row may be true in the next."""
    out = torch.zeros(B, B)
    launch(store_where_kernel, out, 10, MODE=mode, BLOCK=B)
    expected = (ROWS <= COLUMNS, (ROWS < 10) & (COLUMNS >= 1), (ROWS >= 1) & (COLUMNS < 10))[mode]
    assert torch.equal(out, expected.float())


@triton.jit
def sum_of_all_kernel(p_x, p_out, N, BLOCK: tl.constexpr):
    o_r, o_c = tl.arange(0, 4)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(p_out, tl.sum(tl.load(p_x + o_r * BLOCK + o_c, mask=o_c < N, other=0.0)))


def test_a_sum_over_all_dimensions_sees_every_masked_row():
    out = torch.zeros(1)
    launch(sum_of_all_kernel, torch.ones(4, B), out, 10, BLOCK=B)
    assert out.item() == 40


@triton.jit
def masked_product_kernel(p_a, p_b, p_lens, p_out, K, MODE: tl.constexpr, BLOCK: tl.constexpr):
    o_r, o_c = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    if MODE == 0:
        mask = (o_r[:, None] >= 1) & (o_c[None, :] < K)
    elif MODE == 1:
        mask = o_r[:, None] >= o_c[None, :]
    else:
        mask = o_c[None, :] < tl.load(p_lens + o_r)[:, None]
    at = o_r[:, None] * BLOCK + o_c[None, :]
    b_a = tl.load(p_a + at, mask=mask, other=0.0)
    tl.store(p_out + at, tl.dot(b_a, tl.load(p_b + at), input_precision="ieee"))


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_products_of_operands_whose_masks_couple_rows_and_columns(mode):
    a, b, out = torch.randn(3, B, B)
    lens = torch.arange(B, dtype=torch.int32)
    launch(masked_product_kernel, a, b, lens, out, 12, MODE=mode, BLOCK=B)
    mask = ((ROWS >= 1) & (COLUMNS < 12), ROWS >= COLUMNS, lens[:, None] > COLUMNS)[mode]
    torch.testing.assert_close(out, (a * mask) @ b)


@triton.jit
def power_kernel(p_a, p_out, n, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    at = o_r[:, None] * BLOCK + o_r[None, :]
    b_w = tl.load(p_a + at)
    b_x = b_w
    for _ in range(n):
        b_x = tl.dot(b_x, b_w, b_x if ACCUMULATE else None, input_precision="ieee")
    tl.store(p_out + at, b_x)


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_product_that_is_its_own_operand(accumulate):
    a = torch.randn(B, B) / 4
    out = torch.empty_like(a)
    launch(power_kernel, a, out, 2, ACCUMULATE=accumulate, BLOCK=B)
    expected = a
    for _ in range(2):
        expected = expected @ a + (expected if accumulate else 0)
    torch.testing.assert_close(out, expected)


@triton.jit
def transpose_and_add_kernel(p_a, p_x, p_y, n, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    at = o_r[:, None] * BLOCK + o_r[None, :]
    b_y = tl.load(p_a + at)
    b_x = b_y
    for _ in range(n):
        b_x = tl.trans(b_y)
        b_y = b_y + 1
    tl.store(p_x + at, b_x)
    tl.store(p_y + at, b_y)


def test_a_carried_tile_is_read_before_it_is_written():
    a, x, y = torch.randn(3, B, B)
    launch(transpose_and_add_kernel, a, x, y, 3, BLOCK=B)
    torch.testing.assert_close(x, (a + 2).T)
    torch.testing.assert_close(y, a + 3)


@triton.jit
def clear_kernel(p_x, p_out, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_r)
    tl.debug_barrier()
    tl.store(p_x + o_r, b_x * 0)
    tl.debug_barrier()
    tl.store(p_out + o_r, b_x)


@pytest.mark.parametrize("block", [1, 2, 32])
def test_what_was_loaded_outlives_a_store_to_its_place(block):
    x, out = torch.ones(block), torch.zeros(block)
    launch(clear_kernel, x, out, BLOCK=block)
    assert torch.equal(x, torch.zeros(block)) and torch.equal(out, torch.ones(block))


@triton.jit
def repeated_places_kernel(p_x, p_y, n, MODE: tl.constexpr, BLOCK: tl.constexpr):
    o_r, o_c = tl.arange(0, BLOCK), tl.arange(0, 4)
    if MODE == 0:
        places = o_r % 4
    elif MODE == 1:
        places = o_r * 0
    elif MODE == 2:
        places = o_r[:, None] + o_c[None, :]
    elif MODE == 3:
        places = o_r[:, None] + 0 * n + tl.zeros([BLOCK, 4], tl.int32)
    elif MODE == 4:
        places = tl.load(p_y + o_r).to(tl.int32)
    p = p_x + places
    for _ in range(n):
        tl.store(p, tl.load(p) + 1)
        p += 128


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4])
def test_places_that_repeat_are_all_read_before_one_is_written(mode):
    x, y = torch.zeros(2, 128), (torch.arange(64) * 7 % 5).float()
    launch(repeated_places_kernel, x, y, 2, MODE=mode, BLOCK=64)
    expected = torch.zeros_like(x)
    expected[:, : (4, 1, 67, 64, 5)[mode]] = 1
    assert torch.equal(x, expected)


@triton.jit
def two_stores_kernel(p_x, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    p = p_x + o_r % 4
    tl.store(p, o_r)
    tl.store(p, -1, mask=o_r < 2)


def test_the_second_of_two_stores_to_places_that_repeat_is_last():
    x = torch.zeros(4, dtype=torch.int32)
    launch(two_stores_kernel, x, BLOCK=64)
    assert x[:2].tolist() == [-1, -1]


@triton.jit
def rows_kernel(p_x, stride, n, BLOCK: tl.constexpr):
    p = p_x + tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK)[None, :]
    for _ in range(n):
        tl.store(p, tl.load(p) + 1)
        p += BLOCK


def test_no_copy_is_made_of_what_is_read_and_written_in_place(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_FAST_DUMP", str(tmp_path))
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path))
    x = torch.zeros(B, 2 * B)
    launch(rows_kernel, x, 2 * B, 2, BLOCK=B)
    assert (x == 1).all()
    assert "%tile" not in next(tmp_path.glob("rows_kernel-*.ll")).read_text()


@triton.jit
def hand_over_kernel(p_x, p_flag, p_seen, p_out, SCALAR: tl.constexpr, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_r)
    if SCALAR:
        tl.atomic_xchg(p_flag, 1, sem="release")
    else:
        tl.atomic_add(p_flag + o_r, 1)
    while tl.load(p_seen, volatile=True) == 0:
        pass
    tl.store(p_out + o_r, b_x)


@pytest.mark.parametrize("scalar", [True, False])
def test_what_was_loaded_before_an_atomic_is_what_was_there_before_it(scalar):
    x, flag, seen, out = torch.ones(B), torch.zeros(B).int(), torch.zeros(1).int(), torch.zeros(B)
    kernel = in_a_thread(hand_over_kernel, x, flag, seen, out, SCALAR=scalar, BLOCK=B)
    wait_for(lambda: flag[0] == 1)
    x.zero_()
    seen.fill_(1)
    kernel.join(20)
    assert torch.equal(out, torch.ones(B))


def in_a_thread(kernel, *arguments, **constants):
    thread = threading.Thread(target=launch, args=(kernel, *arguments), kwargs=constants, daemon=True)
    thread.start()
    return thread


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@triton.jit
def spin_kernel(p_flag, p_done, BLOCK: tl.constexpr):
    if BLOCK == 0:
        while tl.load(p_flag, volatile=True) == 0:
            pass
    else:
        while tl.max(tl.load(p_flag + tl.arange(0, BLOCK), volatile=True), 0) == 0:
            pass
    tl.store(p_done, 1)


@pytest.mark.parametrize("block", [0, 1, 16])
def test_a_volatile_load_sees_what_another_thread_writes(block):
    flag, done = torch.zeros(max(block, 1)).int(), torch.zeros(1).int()
    kernel = in_a_thread(spin_kernel, flag, done, BLOCK=block)
    time.sleep(0.3)  # compiled by then, as a rule
    assert done.item() == 0
    flag[-1] = 1
    kernel.join(20)
    assert done.item() == 1


@triton.jit
def casts_kernel(p_signed, p_unsigned, p_negative, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    tl.store(p_signed + o_r, o_r.to(tl.int8).to(tl.int32))
    tl.store(p_unsigned + o_r, (o_r - 8).to(tl.uint32).to(tl.int64))
    tl.store(p_negative + o_r, (o_r.to(tl.int8) < 0).to(tl.int32))


def test_integers_wrap_around_in_casts():
    numbers = torch.arange(256)
    signed, unsigned, negative = torch.zeros(3, 256, dtype=torch.int64)
    signed, negative = signed.int(), negative.int()
    launch(casts_kernel, signed, unsigned, negative, BLOCK=256)
    assert torch.equal(signed, numbers.to(torch.int8).int())
    assert torch.equal(unsigned, (numbers - 8) % 2**32)
    assert torch.equal(negative, (numbers.to(torch.int8) < 0).int())


@triton.jit
def divide_kernel(p_x, p_y, p_quotient, p_remainder, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    b_x, b_y = tl.load(p_x + o_r), tl.load(p_y + o_r)
    tl.store(p_quotient + o_r, b_x // b_y)
    tl.store(p_remainder + o_r, b_x % b_y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_least_integer_divided_by_minus_one_ends_no_process(dtype):
    least = torch.iinfo(dtype).min
    x, y = torch.full((B,), least, dtype=dtype), torch.full((B,), -1, dtype=dtype)
    quotient, remainder = torch.ones_like(x), torch.ones_like(x)
    launch(divide_kernel, x, y, quotient, remainder, BLOCK=B)
    assert quotient.unique().tolist() == [least] and remainder.unique().tolist() == [0]


@triton.jit
def hash_kernel(p_narrow, p_wide, p_hash, p_remainder, p_negative, seed, seed64, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    b_h = (o_r * seed + seed) * 31
    b_w = (o_r + seed64) * seed64 * 6364136223846793005
    tl.store(p_narrow + o_r, b_h)
    tl.store(p_wide + o_r, b_h.to(tl.int64))
    tl.store(p_hash + o_r, b_w + (b_h * seed).to(tl.int64))
    tl.store(p_remainder + o_r, ((o_r * seed).to(tl.int64) + seed64) // 7)
    tl.store(p_negative + o_r, (b_h < 0).to(tl.int32) + 2 * (b_h.to(tl.int64) < 0).to(tl.int32))


def wrapped(x, bits):
    return (x + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


@pytest.mark.parametrize("seed", [7, 2**31 - 5, -1640531527])
def test_hashes_of_a_number_that_is_known_at_run_time_wrap_around(seed):
    seed64 = seed * 2**31 + 12345
    outs = [torch.zeros(64, dtype=dtype) for dtype in (torch.int32, torch.int64, torch.int64, torch.int64, torch.int32)]
    launch(hash_kernel, *outs, seed, seed64, BLOCK=64)
    narrow = [wrapped((i * seed + seed) * 31, 32) for i in range(64)]
    wide = [(i + seed64) * seed64 * 6364136223846793005 + wrapped(h * seed, 32) for i, h in enumerate(narrow)]
    remainder = [wrapped(i * seed, 32) + seed64 for i in range(64)]
    expected = [
        narrow,
        narrow,
        [wrapped(x, 64) for x in wide],
        [x // 7 if x >= 0 else -(-x // 7) for x in remainder],  # towards zero
        [3 * (h < 0) for h in narrow],
    ]
    for out, numbers in zip(outs, expected, strict=True):
        assert out.tolist() == numbers


@triton.jit
def limits_kernel(p_out, least, greatest, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    b_wide = o_r.to(tl.int64)
    tl.store(p_out + o_r, (b_wide + least < greatest).to(tl.int32))
    tl.store(p_out + BLOCK + o_r, (b_wide <= greatest).to(tl.int32))
    tl.store(p_out + 2 * BLOCK + o_r, 1, mask=b_wide + least > greatest)
    tl.store(p_out + 3 * BLOCK + o_r, (o_r.to(tl.int64) + tl.full([BLOCK], 2147483640, tl.int32) < 0).to(tl.int32))
    tl.store(p_out + 4 * BLOCK + o_r, ((o_r + 2147483600 + 2147483600) < 0).to(tl.int32))


def test_comparisons_with_the_greatest_integers():
    out = torch.zeros(5, B, dtype=torch.int32)
    launch(limits_kernel, out, -(2**62) - 3, 2**63 - 1, BLOCK=B)
    assert out.tolist() == [[1] * B, [1] * B, [0] * B, [0] * B, [1] * B]


@triton.jit
def nan_kernel(p_x, p_extremes, p_clamped, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_r)
    tl.store(p_extremes, tl.max(b_x, 0))
    tl.store(p_extremes + 1, tl.min(b_x, 0))
    tl.store(p_clamped + o_r, tl.clamp(b_x, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL))


def test_nan_alone_stays():
    extremes, clamped = torch.zeros(2), torch.zeros(B)
    launch(nan_kernel, torch.full((B,), torch.nan), extremes, clamped, BLOCK=B)
    assert extremes.isnan().all() and clamped.isnan().all()


@triton.jit
def histogram_kernel(p_x, p_out, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    tl.store(p_out + o_r, tl.histogram(tl.load(p_x + o_r), BLOCK))


def test_a_histogram_of_bytes():
    out = torch.zeros(256, dtype=torch.int32)
    launch(histogram_kernel, torch.arange(256).to(torch.uint8), out, BLOCK=256)
    assert out.tolist() == [1] * 256


@triton.jit
def nested_return_kernel(p_out, a, b):
    if a > 0:
        if b > 0:
            return
        x = a + 5
    else:
        x = b + 7
    tl.store(p_out, x)


def test_nested_returns_are_refused_by_name():
    with pytest.raises(native.UnsupportedOpError, match=r"nested_return_kernel, .*nested returns"):
        launch(nested_return_kernel, torch.zeros(1, dtype=torch.int32), 3, -2)


@triton.jit
def permute_in_place_kernel(p, MODE: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)
    x = tl.load(p + r)
    if MODE == 0:
        y = tl.flip(x, 0)
    elif MODE == 1:
        y = tl.reshape(tl.permute(tl.reshape(x, (2, BLOCK // 2)), (1, 0)), (BLOCK,))
    elif MODE == 2:
        y = x + tl.gather(x, BLOCK - 1 - r, 0)
    else:
        e = tl.exp(x)
        y = e + tl.gather(e, BLOCK - 1 - r, 0)
    tl.store(p + r, y)


@pytest.mark.parametrize("block", [16, 64, 1024])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_a_permutation_in_place_reads_all_before_it_writes(mode, block):
    x = torch.randn(block)
    e = x.exp()
    expected = (x.flip(0), x.view(2, -1).t().reshape(-1), x + x.flip(0), e + e.flip(0))[mode]
    launch(permute_in_place_kernel, x, MODE=mode, BLOCK=block)
    torch.testing.assert_close(x, expected)


@triton.jit
def add_at_narrow_places_kernel(p, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)
    p += (r * 32768).to(tl.int16).to(tl.int32) + 32768
    tl.store(p, tl.load(p) + 1)


def test_integers_that_are_cut_may_be_the_same():
    """Every second element lies at one place: all of them read what was there before."""
    x = torch.zeros(32769)
    launch(add_at_narrow_places_kernel, x, BLOCK=64)
    assert x[0] == x[32768] == 1 and x.sum() == 2


@triton.jit
def sums_of_sums_kernel(p, step, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    for _ in tl.static_range(DEPTH):
        o = o + o * step
    x = tl.load(p + o)
    tl.store(p + o, x + 1)
    tl.store(p + o + BLOCK, x + 2)


def test_an_address_that_is_a_sum_of_sums_takes_no_time():
    """Each level has the one before twice: looked at anew each time, this takes minutes."""
    x = torch.zeros(32)
    begin = time.process_time()
    launch(sums_of_sums_kernel, x, 0, DEPTH=20, BLOCK=16)
    assert x.tolist() == [1.0] * 16 + [2.0] * 16
    assert time.process_time() - begin < 15


@triton.jit
def transpose_in_place_kernel(p, BLOCK: tl.constexpr):
    p += tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(p, tl.trans(tl.load(p)))


@pytest.mark.parametrize("block", [4, 16, 64])
def test_a_transposition_in_place(block):
    x = torch.randn(block, block)
    expected = x.t().clone()
    launch(transpose_in_place_kernel, x, BLOCK=block)
    assert torch.equal(x, expected)
