"""How many launches a decoder layer takes in a decoding step: each boundary costs about a microsecond."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llama_fast.kernels.attention_decode import plan_attention_decode
from llama_fast.kernels.launch import GPUS, dependent_launch, stand_in_driver
from llama_fast.kernels.matmul import plan_linear
from llama_fast.kernels.norm_qkv_rope import plan_norm_qkv_rope
from llama_fast.kernels.norm_swiglu import plan_norm_swiglu
from llama_fast.kernels.triton_compat import HAS_TRITON, triton
from tests.parity import not_interpreted

pytestmark = not_interpreted


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize(
    ("hidden", "inner", "heads", "head_dim"), [(4096, 14336, 32, 128), (2048, 8192, 32, 64)], ids=["8B", "1B"]
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_a_layer_is_six_launches(arch, hidden, inner, heads, head_dim, rows):
    gpu, kv_heads = GPUS[arch], 8
    x, norm = meta(rows, hidden), meta(hidden)
    q, cache = meta(rows, heads, 1, head_dim), meta(4096, kv_heads, 16, head_dim)
    lens, table = meta(rows, dtype=torch.int32), meta(rows, 512, dtype=torch.int32)
    angles, slots = meta(rows, head_dim, dtype=torch.float32), meta(rows, dtype=torch.int64)
    qkv = meta((heads + 2 * kv_heads) * head_dim, hidden)
    plans = [
        *plan_norm_qkv_rope(x, norm, qkv, None, angles, angles, cache, cache, slots, q, eps=1e-5, gpu=gpu),
        *plan_attention_decode(q, cache, cache, lens, q, block_table=table, scale=1.0, gpu=gpu),
        *plan_linear(q.flatten(1), meta(hidden, heads * head_dim), None, x, x, gpu=gpu),
        *plan_norm_swiglu(x, norm, meta(2 * inner, hidden), None, meta(rows, inner), eps=1e-5, gpu=gpu),
        *plan_linear(meta(rows, inner), meta(hidden, inner), None, x, x, gpu=gpu),
    ]
    assert len(plans) == 6
    assert all(plan.pdl == (arch != "sm_80") for plan in plans)


def test_dependent_launch_can_be_switched_off_for_a_while():
    x, y = meta(1, 4096), meta(1, 4096)
    with dependent_launch(False):
        (plan,) = plan_linear(x, meta(4096, 4096), None, None, y, gpu=GPUS["sm_90"])
        with dependent_launch(True):
            assert GPUS["sm_90"].has_pdl
        assert not (plan.pdl or plan.constants["PDL"] or GPUS["sm_90"].has_pdl)
    assert GPUS["sm_90"].has_pdl and not GPUS["sm_80"].has_pdl


def test_dependent_launch_is_switched_off_in_one_thread_alone():
    with dependent_launch(False), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: GPUS["sm_90"].has_pdl).result()
        assert not GPUS["sm_90"].has_pdl


@pytest.mark.skipif(not HAS_TRITON, reason="its drivers are Triton's")
def test_while_one_thread_compiles_others_have_their_own_gpu():
    class Driver:
        def get_current_device(self):
            return 7

        def get_active_torch_device(self):
            return "cuda:7"

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(Driver())
    try:
        with stand_in_driver(GPUS["sm_80"]), ThreadPoolExecutor(1) as other:
            assert driver.active.get_current_device() == "sm_80"
            assert other.submit(lambda: driver.active.get_current_device()).result() == 7
            assert other.submit(lambda: driver.active.get_active_torch_device()).result() == "cuda:7"
        assert driver.active.get_current_device() == 7
    finally:
        driver._active = before
