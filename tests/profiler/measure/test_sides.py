"""The sides generate the same tokens by the same clock, without end tokens, and over the same weights."""

from itertools import pairwise

import pytest
import torch

from llama_fast.engine.llm import EMBEDDED_MODEL, LLM
from llama_fast.fusion import fuse
from llama_fast.profiler.measure.sides import (
    EngineSide,
    fused_side,
    is_fused,
    load_transformers,
    plain_side,
    sharing_weights,
    static_side,
    transformers_side,
    without_bars,
)
from tests.decoder.gguf.files import write_model
from tests.decoder.gguf.test_model import make as gguf_model
from tests.decoder.models import make, save
from tests.engine.engines import Watch

NEW = 6


@pytest.fixture(scope="module")
def model():
    return make(eos_token_id=list(range(0, 97, 2)))  # half of all tokens end a text


@pytest.fixture(scope="module")
def llm(model, tmp_path_factory):
    return LLM(save(model, tmp_path_factory.mktemp("m")), dtype="float32", device="cpu", progress=False)


def prompts(batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 97, (batch, 5), generator=torch.Generator().manual_seed(1))


def test_all_sides_generate_the_same_tokens_and_clock_each(model, llm):
    sides = [EngineSide(llm), transformers_side(model), fused_side(model), static_side(model)]
    assert [side.name for side in sides] == [
        "llama-fast", "transformers", "transformers, fused", "transformers, static cache + compile"
    ]  # fmt: skip
    generations = [side.generate(prompts(), NEW) for side in sides]
    for generation in generations:
        assert generation.token_ids == generations[0].token_ids
        assert [len(row) for row in generation.token_ids] == [NEW, NEW]
        assert len(generation.times) == NEW
        assert generation.times[0] > 0 and all(a <= b for a, b in pairwise(generation.times))


def test_the_engine_computes_its_prompt_each_time(llm):
    side, computed = EngineSide(llm), []
    for _ in range(2):
        watch = Watch(llm)
        side.generate(prompts(1).repeat(1, 8), NEW)
        computed.append(watch.computed)
    assert computed == [40 + NEW - 1] * 2


def test_logits_are_those_of_the_model(model, llm):
    ids = prompts(1)[0]
    expected = model(ids[None]).logits[0].detach()
    for side in (EngineSide(llm), plain_side(model), fused_side(model)):
        torch.testing.assert_close(side.logits(ids), expected, rtol=1e-3, atol=1e-4)


def test_the_phases_of_a_step(model, llm):
    phases: list[str] = []
    ours = EngineSide(llm)
    ours.watch(phases.append)
    ours.generate(prompts(1), 2, texts=["w5 w6"])
    ours.watch(None)
    prompt = ["schedule", "inputs", "forward", "sample", "read", "text"]
    # a recorded step samples in its replay
    step = [phase for phase in prompt if phase != "sample" or llm._core.runner.steps is None]
    assert phases == ["tokenise", "submit", *prompt, *step]

    phases.clear()
    theirs = transformers_side(model)
    theirs.watch(phases.append)
    theirs.generate(prompts(1), 2)
    assert phases == ["generate", "forward", "generate", "read"] * 2
    theirs.watch(None)
    theirs.generate(prompts(1), 2)
    assert len(phases) == 8 and not model._forward_hooks and not model._forward_pre_hooks


def test_the_wait_for_a_token_is_a_phase_of_a_compiled_step_too(model):
    """What follows the last phase counts as the host's alone: the GPU's work must not be in it."""
    phases: list[str] = []
    side = static_side(model)
    side.watch(phases.append)
    side.generate(prompts(1), 2)
    assert phases == ["step", "read"] * 2


def test_a_models_own_settings_of_generation_change_nothing():
    model = make()
    plain = transformers_side(model).generate(prompts(), NEW).token_ids
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.no_repeat_ngram_size = 1
    assert transformers_side(model).generate(prompts(), NEW).token_ids == plain
    assert model.generation_config.repetition_penalty == 50.0


def test_the_engine_reuses_a_prompt_only_where_it_may(llm):
    side, computed = EngineSide(llm), []
    for reuse in (False, True):
        watch = Watch(llm)
        side.generate(prompts(1).repeat(1, 8), NEW, reuse=reuse)
        computed.append(watch.computed)
    assert computed == [40 + NEW - 1, 8 + NEW - 1]  # two blocks of 16 are known


def test_sides_share_weights_and_leave_the_model_alone(model):
    fused = fused_side(model)
    assert is_fused(fused.model) and not is_fused(model)
    assert plain_side(model).model is model
    assert not is_fused(plain_side(fused.model).model) and is_fused(fused.model)
    for a, b in zip(fused.model.parameters(), model.parameters(), strict=True):
        assert a is b
    assert sharing_weights(model).config is not model.config


def test_a_model_that_is_fused_already_is_named_so():
    model = make()
    fuse(model)
    assert transformers_side(model).name == "transformers, fused"
    assert fused_side(model).model is model


@pytest.mark.parametrize("enabled", [True, False])
def test_transformers_draws_no_bars_while_it_loads_and_may_again_afterwards(model, tmp_path, capfd, enabled):
    """Downloads, which may take long, keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers import AutoTokenizer
    from transformers.utils import logging

    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(tmp_path)
    logging.enable_progress_bar()
    try:
        if not enabled:
            logging.disable_progress_bar()
        with without_bars():
            model.save_pretrained(tmp_path)
            assert are_progress_bars_disabled() == (not enabled)
        write_model(tmp_path / "a.gguf", gguf_model("llama"), "Q4_0")
        for path in (tmp_path, tmp_path / "a.gguf"):
            load_transformers(str(path), dtype=torch.float32, device=torch.device("cpu"))
        assert logging.is_progress_bar_enabled() == enabled
    finally:
        logging.enable_progress_bar()
    assert capfd.readouterr().err == ""
