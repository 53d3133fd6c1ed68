"""The launches of replayed steps: each is timed where it ran, and told which op it belongs to."""

import pytest
import torch

from llama_fast.engine.llm import LLM
from llama_fast.kernels import cpu
from llama_fast.profiler.attribute.kernels import NOT_ATTRIBUTED
from llama_fast.profiler.attribute.on_cpu import Operators
from llama_fast.profiler.attribute.replays import Replays
from llama_fast.profiler.measure.sides import EngineSide
from tests.decoder.models import make, save
from tests.kernels.native.handwritten import native
from tests.parity import not_interpreted

pytestmark = [native, not_interpreted]

LAYERS = 2


def prompts(rows, tokens=7):
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(make(), tmp_path_factory.mktemp("m"))


@pytest.fixture(scope="module")
def side(folder):
    return EngineSide(LLM(folder, dtype="float32", device="cpu", progress=False))


def test_each_token_but_the_first_is_a_replay_that_is_timed_when_its_recording_is_known(side):
    replays = Replays(side)
    _, of_tokens = replays.generate(prompts(1), 6)
    assert [len(each) for each in of_tokens] == [0, 1, 1, 1, 1, 1]
    assert [bool(replay.launches) for (replay,) in of_tokens[1:]] == [False, True, True, True, True]
    generation, of_tokens = replays.generate(prompts(1), 6)
    for i, (replay,) in enumerate(of_tokens[1:]):
        began, ended = (generation.start + time for time in generation.times[i : i + 2])
        assert began < replay.launches[0].start and replay.launches[-1].ended <= replay.ended < ended
        assert all(
            a.ended == pytest.approx(b.start) for a, b in zip(replay.launches, replay.launches[1:], strict=False)
        )
        whole = sum(launch.duration for launch in replay.launches) + replay.around
        assert replay.around > 0 and whole <= ended - began
    assert side.llm.on_phase is None


@pytest.mark.parametrize("rows", [1, 3])
def test_every_launch_belongs_to_an_op(side, rows):
    replays = Replays(side)
    replays.generate(prompts(rows), 6)
    _, of_tokens = replays.generate(prompts(rows), 6)
    (replay,) = of_tokens[-1]
    entries = replays.entries(replay)
    assert [entry.name for entry in entries] == [
        launch.kernel.code.name for launch in replay.recorded.recording.launches
    ]  # fmt: skip
    where = [entry.where for entry in entries]
    assert NOT_ATTRIBUTED not in where
    layer = ["attention.qkv", "attention", "attention.output", "mlp.gate_up", "mlp.down"]
    assert list(dict.fromkeys(where)) == ["embedding", "rotary", *layer, "norm", "head", "sampling"]
    assert where.count("attention.output") == where.count("mlp.down") == LAYERS
    assert sum(entry.work.flops for entry in entries) == sum(op.work.flops for op in replays.ops(replay)) > 0
    assert entries[0].gap == replay.around and not any(entry.gap for entry in entries[1:])


def test_plain_replays_are_not_stamped_and_tokens_are_the_same(side):
    plain = side.generate(prompts(2), 8).token_ids
    replays = Replays(side)
    for _ in range(2):
        generation, _ = replays.generate(prompts(2), 8)
        assert generation.token_ids == plain
    assert side.generate(prompts(2), 8).token_ids == plain
    recorded, _ = side.llm._core.runner.steps.last
    stamps = recorded.recording.stamps
    side.generate(prompts(2), 8)
    assert recorded.recording.stamps == stamps


def test_operators_and_launches_make_a_step_together(side):
    operators = Operators(side, prompts(2), 6)
    operators.time()
    assert operators.replays and len(operators.prompt) == 1 and len(operators.decoding) == 5
    for step in operators.decoding:
        names = {entry.name for entry in step}
        assert {"norm_swiglu_kernel", "token_kernel"} < names
        assert {"sampling", "head", "attention"} < {entry.where for entry in step}
    assert any(entry.name.startswith("llama_fast::") for entry in operators.prompt[0])


@pytest.mark.parametrize("options", [dict(record_steps=False), dict()])
def test_an_engine_that_replays_nothing_is_told_op_by_op(folder, options):
    with cpu.use("native" if options else "pytorch"):
        side = EngineSide(LLM(folder, dtype="float32", device="cpu", progress=False, **options))
        operators = Operators(side, prompts(1), 4)
        operators.time()
    assert not operators.replays and len(operators.decoding) == 3
    assert all(any(entry.where == "mlp.down" for entry in step) for step in operators.decoding)
