"""What random kernels (`test_fuzz.py`) found, each as a small kernel."""

import pytest
import torch

from llama_fast import native
from llama_fast.kernels.native.machine import host
from llama_fast.kernels.triton_compat import HAS_TRITON, tl, triton
from tests.parity import not_interpreted

pytestmark = [not_interpreted, pytest.mark.skipif(not HAS_TRITON or host() is None, reason="no native kernels here")]

B = 16


def launch(kernel, *arguments, **constants):
    native.launch(kernel, (1,), *arguments, **constants)


@triton.jit
def overwritten_kernel(p_x, p_y, p_out, n, MODE: tl.constexpr, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_r)
    if MODE == 0:
        tl.store(p_x + o_r, 7.0)
        b_x = tl.gather(b_x + b_x, BLOCK - 1 - o_r, 0)
    else:
        tl.store(p_x + o_r, tl.where(o_r < n, tl.load(p_y + o_r), b_x))
    tl.store(p_out + o_r, b_x)


@pytest.mark.parametrize("block", [1, 16, 64, 1024])
@pytest.mark.parametrize("mode", [0, 1])
def test_what_was_loaded_outlives_a_store_that_shares_its_loop(mode, block):
    """Of a tile that only later roots of the loop need, or which the store itself needs in some vectors only."""
    x, y, out = torch.randn(3, block)
    expected = (2 * x.flip(0), x.clone())[mode]
    launch(overwritten_kernel, x, y, out, block // 2, MODE=mode, BLOCK=block)
    assert torch.equal(out, expected)


@triton.jit
def products_kernel(p_a, p_out, n, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    at = o_r[:, None] * BLOCK + o_r[None, :]
    for i in range(n):
        b_a = tl.load(p_a + i * BLOCK * BLOCK + at)
        tl.store(p_out + i * BLOCK * BLOCK + at, tl.dot(b_a, b_a, input_precision="ieee"))


def test_a_product_in_a_loop_that_carries_nothing():
    a, out = torch.randn(2, 3, B, B)
    launch(products_kernel, a, out, 3, BLOCK=B)
    torch.testing.assert_close(out, a @ a)


@triton.jit
def narrow_kernel(p_x, p_out, MODE: tl.constexpr, BLOCK: tl.constexpr):
    o_r = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_r).to(p_out.dtype.element_ty)
    tl.store(p_out + o_r, b_x, mask=o_r < 1 if MODE == 0 else o_r == 2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("mode", [0, 1])
def test_of_a_narrow_tile_one_element_is_stored_alone(mode, block, dtype):
    wide = torch.int64 if dtype == torch.int32 else torch.int32
    x, out = torch.arange(-block, 0, dtype=wide), torch.full((block,), 5, dtype=dtype)
    expected = out.clone()
    expected[2 * mode] = 2 * mode - block
    launch(narrow_kernel, x, out, MODE=mode, BLOCK=block)
    assert torch.equal(out, expected)


@triton.jit
def batch_kernel(p_a, p_b, p_out, batch, rows, LEFT: tl.constexpr, BATCH: tl.constexpr, BLOCK: tl.constexpr):
    o_b, o_r = tl.arange(0, BATCH)[:, None, None], tl.arange(0, BLOCK)
    at = (o_b * BLOCK + o_r[None, :, None]) * BLOCK + o_r[None, None, :]
    mask = (o_b < batch) & (o_r < rows)[None, :, None]
    b_a = tl.load(p_a + at, mask=mask, other=0.0) if LEFT else tl.load(p_a + at)
    b_b = tl.load(p_b + at) if LEFT else tl.load(p_b + at, mask=mask, other=0.0)
    tl.store(p_out + at, tl.dot(b_a, b_b, input_precision="ieee"))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("rows", [B, 5])
def test_a_batch_of_products_of_which_a_mask_leaves_some_out(rows, left):
    a, b = torch.randn(2, 4, B, B)
    out = torch.full((4, B, B), torch.nan)
    launch(batch_kernel, a, b, out, 3, rows, LEFT=left, BATCH=4, BLOCK=B)
    masked = a if left else b
    masked[3:], masked[:, rows:] = 0, 0
    torch.testing.assert_close(out, a @ b)
