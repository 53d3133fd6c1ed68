"""PyTorch's modes around loading and calling change nothing of what an engine does, and the engine none of them."""

import contextlib
import json

import pytest
import torch
from torch.overrides import TorchFunctionMode

from llama_fast.engine.sampling import SamplingParams
from tests.decoder.models import make, random_ids, save
from tests.engine.engines import DEVICE, engine
from tests.parity import not_interpreted

pytestmark = not_interpreted

PROMPTS = [random_ids(length, seed=length) for length in (40, 3, 17)]
EACH = [
    SamplingParams(temperature=0.0, max_tokens=20, logprobs=2, prompt_logprobs=1),
    SamplingParams(seed=1, temperature=1.3, top_p=0.9, min_p=0.01, repetition_penalty=1.2, max_tokens=20),
    SamplingParams(seed=2, top_k=9, logit_bias={5: 1.5}, frequency_penalty=0.3, min_tokens=4, max_tokens=20),
]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)  # as the tests run


@contextlib.contextmanager
def own_stream():
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


class Doubling(TorchFunctionMode):
    """A caller's own mode: every float tensor that a function makes is twice as large."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if isinstance(out, torch.Tensor) and out.is_floating_point() else out


MODES = {
    "default device meta": lambda: default_device("meta"),
    "inside device meta": lambda: torch.device("meta"),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast cpu": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast cuda": lambda: torch.autocast("cuda", dtype=torch.float16),
    "deterministic algorithms": deterministic,
    "a torch function mode": Doubling,
} | ({"a stream": own_stream} if DEVICE == "cuda" else {})


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory):
    """Rope types of which each computes its angles in its own way; and a config that must be checked against the weights."""
    untied = save(make(), tmp_path_factory.mktemp("untied"))
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return {"untied after all": untied} | {name: folder(name) for name in ("dynamic", "longrope", "yarn", "stablelm")}


def outcome(llm):
    """All that a user gets of an engine; what depends on another dtype or device would differ in its bits."""
    logits = llm.logits(PROMPTS[0])
    assert (logits.dtype, logits.device.type, logits.is_inference()) == (torch.float32, DEVICE, True)
    return llm.generate(PROMPTS, EACH), logits.tolist()


@pytest.fixture(scope="module")
def expected(folders):
    return {name: outcome(engine(folder, max_context=128)) for name, folder in folders.items()}


@pytest.mark.filterwarnings("ignore:.*CUDA is not available", "ignore:max_context=128 is more")
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_around_loading(mode, folders, expected):
    for name, folder in folders.items():
        with MODES[mode]():
            llm = engine(folder, max_context=128)
        for parameter in llm.decoder.parameters():
            assert parameter.device.type == DEVICE and not parameter.is_inference()
        assert outcome(llm) == expected[name], name


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_around_calls(mode, folders, expected):
    for name, folder in folders.items():
        llm = engine(folder, max_context=128)
        with MODES[mode]():
            modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            assert outcome(llm) == expected[name], name
            after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            assert after == modes
