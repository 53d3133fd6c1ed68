"""What is written into tensors that no cache holds goes around the caches, and is the same to the bit."""

import pytest
import torch
import triton
import triton.language as tl

from llama_fast import native
from llama_fast.kernels.launch import LaunchPlan
from llama_fast.kernels.native import compiled, drivers
from llama_fast.kernels.native.codegen import emit_assembly
from llama_fast.kernels.native.front_end import read_plan
from llama_fast.kernels.native.lowering import lower
from llama_fast.kernels.native.machine import AVX2, AVX512, NEON
from tests.parity import not_interpreted

pytestmark = [
    not_interpreted,
    pytest.mark.skipif(native.why_not_native() is not None, reason=f"no native kernels: {native.why_not_native()}"),
]


@triton.jit
def double_kernel(p_x, p_y, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + o, mask=o < N, other=0)
    tl.store(p_y + o, x + x, mask=o < N)


@triton.jit
def append_kernel(p_x, p_y, p_slots, BLOCK: tl.constexpr):
    o, i = tl.arange(0, BLOCK), tl.program_id(0)
    tl.store(p_y + tl.load(p_slots + i) * BLOCK + o, tl.load(p_x + i * BLOCK + o))


@pytest.fixture
def small_cache(monkeypatch):
    """All tensors are large."""
    monkeypatch.setattr(compiled, "cache_bytes", lambda: 1)


def plan(x, y):
    return LaunchPlan(double_kernel, (-(-x.numel() // 256),), dict(p_x=x, p_y=y, N=x.numel()), dict(BLOCK=256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("offset", [0, 1, 7])
@pytest.mark.parametrize("n", [1, 255, 1000, 4096])
def test_the_same_wherever_tensors_begin(n, offset, dtype, small_cache):
    x = torch.arange(n + 8).to(dtype)[offset : offset + n]
    y = torch.full((n + 16,), -1).to(dtype)
    plan(x, y[offset : offset + n]).launch()
    assert torch.equal(y[offset : offset + n], x + x)
    assert (y[:offset] == -1).all() and (y[offset + n :] == -1).all()


def test_in_place(small_cache):
    x = torch.arange(1000.0)
    plan(x, x).launch()
    assert torch.equal(x, torch.arange(1000.0) * 2)


def assembly(machine, large, aliases=None):
    x = torch.zeros(4096)
    ir = lower(read_plan(plan(x, torch.zeros(4096))), aliases or {}, machine, large=frozenset(large))
    return emit_assembly(drivers.with_work_function(ir, "double_kernel", machine), machine)


@pytest.mark.parametrize("machine", [AVX512, AVX2])
def test_the_instructions(machine):
    assert "vmovntps" in assembly(machine, {1}) and "sfence" in assembly(machine, {1})
    for kept in (assembly(machine, {0}), assembly(machine, {0, 1}, {1: 0})):  # what is read, and what is overwritten
        assert "movnt" not in kept and "sfence" not in kept


def test_slots_of_a_cache_stay_in_the_caches():
    x, y, slots = torch.zeros(2, 64), torch.zeros(8, 64), torch.tensor([3, 1])
    function = read_plan(LaunchPlan(append_kernel, (2,), dict(p_x=x, p_y=y, p_slots=slots), dict(BLOCK=64)))
    assert "nontemporal" not in lower(function, {}, AVX512, large=frozenset({1}))


def test_another_machine_is_compiled_too():
    assert "sfence" not in assembly(NEON, {1})


def test_which_tensors_are_large(monkeypatch):
    monkeypatch.setattr(compiled, "cache_bytes", lambda: 2400)
    x = torch.zeros(100)
    assert compiled.large_tensors(plan(x, torch.zeros(100))) == ("p_x", "p_y")
    assert compiled.large_tensors(plan(x[:75], torch.zeros(125))) == ("p_x", "p_y")
    assert compiled.large_tensors(plan(x[:74], torch.zeros(126))) == ("p_y",)
    assert compiled.large_tensors(plan(x[:99], torch.zeros(100))) == ()
