"""Calls of ops that were made before go past the dispatcher, and nobody who looks at calls misses one for that."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast import native as native_api
from llama_fast import ops
from llama_fast.kernels import cpu
from llama_fast.kernels.launch import LaunchPlan
from llama_fast.kernels.native import compiled
from llama_fast.kernels.native import tensors as native_tensors
from llama_fast.kernels.norm_qkv_rope import norm_qkv_rope
from llama_fast.kernels.triton_compat import tl, triton
from tests.kernels.native.handwritten import native
from tests.parity import not_interpreted

pytestmark = [native, not_interpreted]
OP = torch.ops.llama_fast.rms_norm.default


@triton.jit
def add_one_kernel(p, BLOCK: tl.constexpr):
    p += tl.arange(0, BLOCK)
    tl.store(p, tl.load(p) + 1)


@triton.jit
def not_compiled_kernel(p, BLOCK: tl.constexpr):
    p += tl.arange(0, BLOCK)
    tl.store(p, tl.load(p).to(tl.float8e5).to(tl.float32))


@pytest.fixture(autouse=True)
def known():
    """The call is known before each test, inside of inference mode and outside, with and without a gradient."""
    with cpu.use("native"):
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                for _ in range(3):
                    ops.rms_norm(*tensors())
                    ops.rms_norm(*leaves())
        yield


def tensors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 64, generator=generator), torch.randn(64, generator=generator)


def leaves():
    return tuple(tensor.requires_grad_() for tensor in tensors())


def expected(x, weight):
    return torch.nn.functional.rms_norm(x, (64,), weight, 1e-6)


def test_a_known_call_needs_no_dispatcher(monkeypatch):
    """So it is this that the other tests are about."""
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", lambda *_: pytest.fail("went through the dispatcher"))
    x, weight = tensors()
    torch.testing.assert_close(ops.rms_norm(x, weight), expected(x, weight))
    with torch.no_grad():
        x, weight = leaves()
        torch.testing.assert_close(ops.rms_norm(x, weight), expected(x, weight))


@pytest.mark.parametrize(
    ("function", "tensors", "wrong", "message"),
    [
        (ops.cross_entropy, (torch.ones(2, 8), torch.tensor([1, 7])), torch.tensor([1, 8]), "labels must lie in"),
        (
            ops.attention_decode,
            (torch.ones(1, 2, 1, 16), torch.ones(1, 2, 4, 16), torch.ones(1, 2, 4, 16), torch.tensor([4]).int()),
            torch.tensor([5]).int(),
            "cache_lens must be at most 4",
        ),
    ],
)
def test_values_are_looked_at_in_known_calls_too(function, tensors, wrong, message, monkeypatch):
    for _ in range(2):
        result = function(*tensors)
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", lambda *_: pytest.fail("went through the dispatcher"))
    monkeypatch.setattr(LaunchPlan, "launch", lambda _: pytest.fail("was planned again"))
    torch.testing.assert_close(function(*tensors), result)
    with pytest.raises(ValueError, match=message):
        function(*tensors[:-1], wrong)


def test_a_written_tensor_that_shares_memory_makes_another_call(monkeypatch):
    """Of two tensors that are only read it does not matter."""
    memory = torch.randn(4, 1, 4, 16)
    caches, (x, norm), weights = torch.randn(2, 4, 1, 4, 16).unbind(), torch.randn(2, 1, 16), torch.randn(48, 16)
    (cos, sin), slots = torch.zeros(2, 1, 16), torch.tensor([3])

    def launches(x, norm_weight, k_cache, v_cache):
        count = 0

        def launch(plan, launch=LaunchPlan.launch):
            nonlocal count
            count += 1
            launch(plan)

        with monkeypatch.context() as patch:
            patch.setattr(LaunchPlan, "launch", launch)
            norm_qkv_rope(x, norm_weight, weights, None, cos, sin, k_cache, v_cache, slots, eps=1e-6, heads=1)
        return count

    launches(x, norm[0], *caches)
    assert launches(x, x[0], *caches) == 0
    assert launches(x, norm[0], memory, memory) > 0
    assert launches(memory[0, 0, :1], norm[0], memory, caches[1]) > 0
    assert launches(x, norm[0], caches[0], memory) == 0


def test_gradients():
    ours, theirs = leaves(), leaves()
    ops.rms_norm(*ours).square().sum().backward()
    expected(*theirs).square().sum().backward()
    for leaf, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)


def test_a_dispatch_mode_sees_it():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    for arguments in (tensors(), leaves()):
        with Mode():
            ops.rms_norm(*arguments)
    assert seen.count(OP) == 2


def test_a_function_mode_sees_it():
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        ops.rms_norm(*tensors())
    assert OP in seen


@pytest.mark.parametrize("make", [tensors, leaves])
def test_a_subclass_sees_it(make):
    seen = []

    class Tensor(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x, weight = make()
    for _ in range(3):
        ops.rms_norm(x.as_subclass(Tensor), weight)
    assert seen.count(OP) == 3


def test_a_profiler_sees_it():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.rms_norm(*tensors())
    assert "llama_fast::rms_norm" in {event.name for event in profile.events()}


def test_fake_tensors_stay_fake():
    with FakeTensorMode() as mode:
        assert isinstance(ops.rms_norm(*(mode.from_tensor(tensor) for tensor in tensors())), FakeTensor)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn])
def test_other_layouts_are_refused_by_the_dispatcher(sparse):
    x, weight = tensors()
    with pytest.raises(NotImplementedError, match=r"Could not run 'llama_fast::rms_norm'.* backend"):
        ops.rms_norm(sparse(x), weight)


def test_transforms():
    x, weight = tensors()
    torch.testing.assert_close(torch.vmap(lambda row: ops.rms_norm(row, weight))(x), expected(x, weight))
    made = torch.fx.experimental.proxy_tensor.make_fx(lambda x, weight: ops.rms_norm(x, weight))(x, weight)
    assert OP in {node.target for node in made.graph.nodes}


def test_tangents_are_refused():
    x, weight = tensors()
    with torch.no_grad(), torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        ops.rms_norm(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), weight)


def test_a_negated_view_is_negated():
    x, weight = tensors()
    torch.testing.assert_close(ops.rms_norm(torch._neg_view(x), weight), -expected(x, weight))


def test_another_choice_is_not_the_known_call(monkeypatch):
    x, weight = tensors()
    asked = []
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", lambda op, *arguments: asked.append(op) or (None,))
    with cpu.use("pytorch"):
        ops.rms_norm(x, weight)
    assert asked == [OP]


def test_autocast_casts():
    x, weight = torch.randn(4, 64), torch.randn(8, 64)
    for _ in range(3):
        assert ops.linear(x, weight).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rows", "features", "has_fast_mkl", "natively"),
    [
        (1, 1024, True, False), (3, 1024, True, False), (4, 1024, True, True), (16, 1024, True, True), (17, 1024, True, False),
        (4, 512, True, False), (1, 1040, False, True), (4, 528, False, True), (17, 1040, False, False),
    ],
)  # fmt: skip
def test_few_rows_of_float32_run_natively_where_that_is_faster(rows, features, has_fast_mkl, natively, monkeypatch):
    launched, launch = [], LaunchPlan.launch
    monkeypatch.setattr(LaunchPlan, "launch", lambda plan: launched.append(plan) or launch(plan))
    monkeypatch.setattr("llama_fast.kernels.linear.has_fast_mkl", lambda: has_fast_mkl)
    with cpu.use("auto"):
        ops.linear(torch.ones(rows, features), torch.ones(features, features))
    assert bool(launched) == natively


def test_numbers_that_the_dispatcher_converts_or_refuses():
    x, weight = tensors()
    for _ in range(3):
        torch.testing.assert_close(ops.rms_norm(x, weight, 1), torch.nn.functional.rms_norm(x, (64,), weight, 1.0))
    with pytest.raises(RuntimeError, match="eps"):
        ops.rms_norm(x, weight, "1e-6")


def test_sizes_that_are_symbols_stay_symbols():
    x, weight = tensors()
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    rows = ops.rms_norm(mode.from_tensor(x, symbolic_context=context), mode.from_tensor(weight)).shape[0]
    assert isinstance(rows, torch.SymInt) and rows.node.expr.is_symbol


def test_where_tensors_cannot_be_looked_into_ops_are_pytorchs(monkeypatch):
    """As with a release that lays them out in another way: nothing breaks, and it is said."""
    monkeypatch.setattr(native_tensors, "why_unreadable", lambda: "what is in a tensor is not found")
    with cpu.use("auto"):
        made = cpu.Implementation(OP, pytest.fail, lambda *_: "PyTorch's", lambda *_: False, None)
        for _ in range(3):
            assert made(*tensors(), 1e-6, 0.0) == "PyTorch's"
        assert cpu.chosen() == "pytorch" and cpu.why_not_native() == "what is in a tensor is not found"
        with pytest.raises(RuntimeError, match="no native kernels: what is in a tensor"), cpu.use("native"):
            pass


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_where_a_tensor_has_no_sizes_or_too_many_the_dispatcher_says_so():
    weight = torch.ones(64)
    for x in (torch.eye(64).to_sparse_csr(), torch.eye(64).to_sparse()):
        with pytest.raises(NotImplementedError, match="Could not run 'llama_fast::rms_norm'"):
            ops.rms_norm(x, weight)
    with pytest.raises(RuntimeError, match="up to 64 dims"):
        ops.rms_norm(torch.ones([1] * 2000 + [64]), weight)


def test_a_zero_with_a_sign_is_another_call():
    x, weight = torch.ones(1, 64), torch.full((64,), -0.0)
    for offset in (0.0, -0.0, 0.0):
        assert ops.rms_norm(x, weight, offset=offset).signbit().all() == (str(offset) == "-0.0")


def test_calls_with_nan_are_one_call():
    x, weight = tensors()
    made = native_tensors.description("tt.")
    assert made(x, weight, float("nan")) == made(x, weight, float("nan")) != made(x, weight, 0.0)


def test_bounds_are_checked_from_when_that_is_asked_for(monkeypatch):
    for asked in ("0", "1", "0"):
        monkeypatch.setenv("LLAMA_FAST_CHECK_BOUNDS", asked)
        ops.rms_norm(*tensors())
        with compiled.recording() as launches:  # of a call that is not remembered
            ops.rms_norm(*tensors())
        assert [kernel.checks_bounds for kernel, _ in launches] == [True] * (asked == "1")


def test_an_op_that_writes_runs_none_of_its_kernels_unless_all_are_compiled():
    op = torch.ops.llama_fast.norm_qkv_rope.default
    x = torch.zeros(16)

    def kernel(*arguments):
        native_api.launch(add_one_kernel, (1,), x, BLOCK=16)
        native_api.launch(not_compiled_kernel, (1,), x, BLOCK=16)

    made = cpu.Implementation(op, kernel, lambda *_: x.add_(1), lambda *_: False, None)
    with pytest.warns(RuntimeWarning, match="norm_qkv_rope runs on PyTorch's ops"):
        made(x, *torch.ones(10, 1))
    assert x.tolist() == [1.0] * 16
    cpu.fallbacks.pop("llama_fast::norm_qkv_rope")


def test_what_falls_back_has_no_native_product_inside():
    def kernel(*arguments):
        raise NotImplementedError("tt.unheard_of")

    asked_for = cpu.chosen()
    made = cpu.Implementation(
        torch.ops.llama_fast.linear.default, kernel, lambda *_: cpu.chosen(), lambda *_: False, None
    )
    with pytest.warns(RuntimeWarning, match="linear runs on PyTorch's ops: tt.unheard_of"):
        assert made(torch.ones(2, 3)) == "pytorch"
    assert made(torch.ones(2, 3)) == "pytorch"
    assert cpu.chosen() == asked_for
    cpu.fallbacks.pop("llama_fast::linear")


def test_packed_sequences_that_attend_to_themselves_are_remembered():
    """Their ends are those of the keys as well, and a tensor in two places would be in neither."""
    q, k, v = (torch.randn(2, 130, 16, requires_grad=True) for _ in range(3))
    for cu_seqlens_k in (True, False):
        ends = torch.tensor([0, 64, 130], dtype=torch.int32)
        options = {"cu_seqlens_q": ends} | ({"cu_seqlens_k": ends} if cu_seqlens_k else {})
        out = ops.attention(q, k, v, **options)
        dout = torch.ones_like(out)
        out.backward(dout)
        with compiled.recording() as launches:
            ops.attention(q, k, v, **options).backward(dout)
        assert launches == []


def test_threads_may_make_the_first_call_at_once():
    """In a process of its own, whose first call it is: each thread's function needs what another has made as well."""
    script = """
import gc, sys, threading, torch
from llama_fast.kernels.native import tensors
sys.setswitchinterval(1e-6)
barrier, made = threading.Barrier(8), []
def work():
    barrier.wait()
    made.append(tensors.description("t."))
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
gc.collect()
x = torch.ones(3)
assert len({describe(x, 1) for describe in made}) == 1
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_fork_waits_for_what_is_being_compiled():
    """A child that is made in the midst of it waits for a lock that nobody will release."""
    script = """
import os, signal, threading, time, torch
from llama_fast.kernels.native import once
from tests.kernels.native.test_calls import add_one_kernel
from llama_fast import native
x, inside = torch.zeros(16), threading.Event()
def compile():
    with once.lock:
        inside.set()
        time.sleep(0.5)
threading.Thread(target=compile).start()
inside.wait()
child = os.fork()
if not child:
    signal.alarm(30)
    native.launch(add_one_kernel, (1,), x, BLOCK=16)
    os._exit(0 if x.sum() == 16 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
