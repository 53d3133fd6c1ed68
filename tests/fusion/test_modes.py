"""`fuse` finds the same whatever is switched on around the call, and leaves that as it was."""

import threading
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import llama_fast
from llama_fast.fusion.modes import default_modes
from llama_fast.fusion.verify import InFloat64
from tests.fusion.models import make, random_ids
from tests.parity import not_interpreted

pytestmark = not_interpreted


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
        assert torch.empty(1).device.type == device
    finally:
        torch.set_default_device(None)


@contextmanager
def global_hooks():
    calls = []
    handles = [
        nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1)),
        nn.modules.module.register_module_full_backward_hook(lambda *_: calls.append(1)),
    ]
    try:
        yield
        assert not calls, "hooks must not fire while layers are checked"
        nn.Identity()(torch.ones(1))
        assert calls, "they must be there again"
    finally:
        for handle in handles:
            handle.remove()


AROUND = {
    "default dtype bfloat16": lambda _: default_dtype(torch.bfloat16),
    "default dtype float64": lambda _: default_dtype(torch.float64),
    "default device": lambda _: default_device("meta"),
    "device context": lambda _: torch.device("meta"),
    "inference_mode": lambda _: torch.inference_mode(),
    "no_grad": lambda _: torch.no_grad(),
    "autocast": lambda device: torch.autocast(device.type, torch.bfloat16),
    "fake tensors": lambda _: FakeTensorMode(),
    "flop counter": lambda _: FlopCounterMode(display=False),
    "function mode": lambda _: InFloat64(),
    "global hooks": lambda _: global_hooks(),
}


@pytest.fixture(scope="module")
def expected(device):
    return {mode: llama_fast.fuse(make(device=device), mode=mode) for mode in ("inference", "training")}


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("around", AROUND)
def test_what_is_around_changes_nothing(around, mode, device, expected):
    model = make(device=device)
    with AROUND[around](device):
        report = llama_fast.fuse(model, mode=mode)
    assert report == expected[mode]
    assert not report.left, str(report)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_model_made_in_inference_mode(mode, device):
    with torch.inference_mode():
        model = make(device=device)
    assert not llama_fast.fuse(model, mode=mode).left


def test_what_is_around_is_there_again_after_an_error(device, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    model = make(device=device)
    monkeypatch.setattr(llama_fast.ops, "rms_norm", interrupt)
    with default_dtype(torch.bfloat16), torch.inference_mode(), torch.autocast(device.type, torch.float16):
        with pytest.raises(KeyboardInterrupt):
            llama_fast.fuse(model)
        assert torch.get_default_dtype() == torch.bfloat16
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled(device.type)
    assert model(random_ids(device=device)).logits.dtype == torch.float32


def test_two_threads_give_back_what_was_set():
    """The one that began first ends first: without a turn for each, the other's float32 would stay."""
    inside, go = threading.Event(), threading.Event()

    def first():
        with default_modes():
            inside.set()
            go.wait(10)

    def second():
        with default_modes():
            done.wait(0.2)

    done = threading.Event()
    torch.set_default_dtype(torch.bfloat16)
    try:
        threads = [threading.Thread(target=first), threading.Thread(target=second)]
        threads[0].start()
        inside.wait(10)
        threads[1].start()
        threads[1].join(0.1)  # it waits, or has begun
        go.set()
        for thread in threads:
            thread.join(10)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_numbers_go_on_where_they_were():
    """A model in training mode draws for its dropout when its layers' calls are recorded."""
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).train()
    before = torch.get_rng_state()
    llama_fast.fuse(model)
    assert torch.equal(torch.get_rng_state(), before)
