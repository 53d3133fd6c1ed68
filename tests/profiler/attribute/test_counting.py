"""The bytes and FLOPs of a step, against counts by hand."""

import pytest
import torch
import torch.nn.functional as F

from llama_fast.engine.llm import LLM
from llama_fast.kernels import cpu
from llama_fast.kernels.norm_qkv_rope import norm_qkv_rope_op
from llama_fast.ops import attention, attention_decode, linear
from llama_fast.profiler.attribute.counting import OpCounter
from llama_fast.profiler.attribute.on_cpu import count
from llama_fast.profiler.attribute.replays import Replays
from llama_fast.profiler.measure.sides import EngineSide, transformers_side
from llama_fast.profiler.measure.work import Work, decoding_step_work
from tests.decoder.models import make, save
from tests.kernels.native.handwritten import native
from tests.parity import not_interpreted

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 64, 112, 4, 2, 16, 97, 2
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
FP32, INT64 = 4, 8


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def llm(model, tmp_path_factory):
    return LLM(save(model, tmp_path_factory.mktemp("m")), dtype="float32", device="cpu", progress=False)


def counted(call, *, model=None):
    counter = OpCounter(model or torch.nn.Module())
    with torch.inference_mode(), counter.listening():
        call()
    return counter.ops


def total(ops) -> Work:
    return sum((op.work for op in ops), Work())


def decoding_ops(side, model, *, batch: int, prompt: int):
    """The ops of the last decoding step of three tokens, replayed or not: each row attends to prompt + 2 keys."""
    counter, replays, prompts = OpCounter(model), Replays(side), torch.randint(3, VOCAB, (batch, prompt))
    _, of_tokens = count(side, prompts, 3, counter)
    _, replayed = replays.generate(prompts, 3)
    of_replays = [op for replay in (replayed or [[]])[-1] for op in replays.ops(replay)]
    return [*of_replays, *(op for op in of_tokens[-1] if op.phase != "inputs")]


def around_attention(batch: int) -> dict[str, Work]:
    """What a decoding step's ops do that are the same ones natively and on PyTorch's."""
    x = batch * HIDDEN  # elements of the hidden states
    return {
        "embedding": Work(batch * INT64 + x * FP32, x * FP32),
        "rotary": Work(batch * INT64 + HEAD_DIM * FP32, 2 * batch * HEAD_DIM * FP32),
        "attention.output": Work(
            (2 * x + HIDDEN * HIDDEN) * FP32, x * FP32, 2 * batch * HIDDEN * HIDDEN  # with the residual
        ) * LAYERS,
        "mlp.down": Work((x + batch * INNER + INNER * HIDDEN) * FP32, x * FP32, 2 * batch * HIDDEN * INNER) * LAYERS,
        "norm": Work((x + HIDDEN) * FP32, (x + batch) * FP32),  # and 1 / rms of each row
        "head": Work((x + VOCAB * HIDDEN) * FP32, batch * VOCAB * FP32, 2 * batch * HIDDEN * VOCAB),
    }  # fmt: skip


def turning_and_appending(batch: int) -> Work:
    """cos, sin and slots are read, q and the new keys and values written."""
    return Work(2 * batch * HEAD_DIM * FP32 + batch * INT64, batch * QKV * FP32)


@native
@not_interpreted
@pytest.mark.parametrize("batch", [1, 3])
def test_a_replayed_step_of_two_layers_is_what_a_hand_counts(llm, batch):
    keys, x = 11, batch * HIDDEN
    expected = around_attention(batch) | {
        "attention.qkv": (
            Work((x + HIDDEN + QKV * HIDDEN) * FP32, 0, 2 * batch * HIDDEN * QKV) + turning_and_appending(batch)
        ) * LAYERS,
        "attention": Work(  # each row's length, and the block that its keys are in
            batch * (HEADS * HEAD_DIM + 2 * keys * KV_HEADS * HEAD_DIM + 1 + 1) * FP32,
            batch * HEADS * HEAD_DIM * FP32, batch * 4 * keys * HEADS * HEAD_DIM,
        ) * LAYERS,
        "mlp.gate_up": Work(
            (x + HIDDEN + 2 * INNER * HIDDEN) * FP32, batch * INNER * FP32, 4 * batch * HIDDEN * INNER
        ) * LAYERS,
    }  # fmt: skip
    check_step(llm, batch, keys, expected)


@not_interpreted  # there a step is of the fused ops
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_of_plain_ops_of_two_layers_is_what_a_hand_counts(model, tmp_path, batch):
    keys, x = 11, batch * HIDDEN
    norm = around_attention(batch)["norm"]
    expected = around_attention(batch) | {
        "attention_norm": norm * LAYERS,
        "attention.qkv": Work((x + QKV * HIDDEN) * FP32, batch * QKV * FP32, 2 * batch * HIDDEN * QKV) * LAYERS,
        "attention.append": (Work(batch * QKV * FP32) + turning_and_appending(batch)) * LAYERS,
        "attention": Work(  # a row at a time: q and out, keys and values
            batch * (HEADS * HEAD_DIM + 2 * keys * KV_HEADS * HEAD_DIM) * FP32,
            batch * HEADS * HEAD_DIM * FP32, batch * 4 * keys * HEADS * HEAD_DIM,
        ) * LAYERS,
        "mlp_norm": norm * LAYERS,
        "mlp.gate_up": Work(
            (x + 2 * INNER * HIDDEN) * FP32, 2 * batch * INNER * FP32, 4 * batch * HIDDEN * INNER
        ) * LAYERS,
        "mlp": Work(2 * batch * INNER * FP32, batch * INNER * FP32) * LAYERS,
    }  # fmt: skip
    with cpu.use("pytorch"):
        check_step(
            LLM(save(model, tmp_path), dtype="float32", device="cpu", progress=False), batch, keys, expected
        )  # fmt: skip


def check_step(llm, batch: int, keys: int, expected: dict[str, Work]) -> None:
    ops = decoding_ops(EngineSide(llm), llm.decoder, batch=batch, prompt=keys - 2)
    joining = "aten::cat"  # of the rows' attention
    for where, work in expected.items():
        assert total(op for op in ops if op.where == where and op.name != joining) == work, where
    # all products and attention together are what the model must do
    assert total(ops).flops == decoding_step_work(llm.config, batch, keys, torch.float32).flops


def test_ops_know_their_place_and_phase(model, tmp_path):
    llm = LLM(save(model, tmp_path), dtype="float32", device="cpu", progress=False, record_steps=False)
    ops = decoding_ops(EngineSide(llm), llm.decoder, batch=1, prompt=5)
    assert {op.where for op in ops if op.phase == "sample"} == {"sampling"}
    assert [op.where for op in ops if op.name == "llama_fast::sample"] == ["sampling"]
    assert len([op for op in ops if op.where == "mlp.down"]) == LAYERS

    side = transformers_side(model)
    ops = decoding_ops(side, model, batch=1, prompt=5)
    products = [op.where for op in ops if op.name == "aten::mm" and op.phase == "forward"]
    of_layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    of_layer += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert products == of_layer * LAYERS + ["head"]
    assert {op.where for op in ops if op.name == "aten::argmax"} == {"generate"}
    assert not model._forward_hooks and not any(module._forward_pre_hooks for module in model.modules())


def test_transformers_must_multiply_as_much_as_we(llm, model):
    ours = decoding_ops(EngineSide(llm), llm.decoder, batch=2, prompt=7)
    theirs = decoding_ops(transformers_side(model), model, batch=2, prompt=7)
    assert total(ours).flops == total(theirs).flops > 0


def test_what_moves_nothing_and_what_is_written_in_place():
    x, y = torch.zeros(4, 6), torch.ones(6)
    assert total(counted(lambda: (x.view(24), x.t(), x[1:], x.expand(2, 4, 6), torch.empty(9), x.float()))) == Work()
    assert total(counted(lambda: x + y)) == Work((24 + 6) * FP32, 24 * FP32)
    assert total(counted(lambda: x.add_(y.expand(4, 6)))) == Work((24 + 6) * FP32, 24 * FP32)
    assert total(counted(lambda: x.copy_(y))) == Work(6 * FP32, 24 * FP32)
    assert total(counted(lambda: x.zero_())) == Work(0, 24 * FP32)
    index = torch.tensor([1, 3])
    assert total(counted(lambda: x[index])) == Work(12 * FP32 + 2 * INT64, 12 * FP32)
    source, places = torch.ones(2, 6), torch.zeros(4, 2, dtype=torch.int64)
    assert total(counted(lambda: x.index_copy_(0, index, source))) == Work(12 * FP32 + 2 * INT64, 12 * FP32)
    assert total(counted(lambda: x.index_add_(0, index, source))) == Work(24 * FP32 + 2 * INT64, 12 * FP32)
    assert total(counted(lambda: x.scatter_(1, places, 1.0))) == Work(8 * INT64, 8 * FP32)
    assert total(counted(lambda: x.bfloat16())) == Work(24 * FP32, 24 * 2)


def test_products_and_pytorchs_attention():
    a, b = torch.ones(3, 5, 7), torch.ones(3, 7, 2)
    assert total(counted(lambda: a @ b)) == Work((105 + 42) * FP32, 30 * FP32, 2 * 3 * 5 * 7 * 2)
    w, bias = torch.ones(4, 7), torch.ones(4)
    linears = counted(lambda: (F.linear(a, w, bias), linear(a, w, bias)))
    for op in [op for op in linears if op.work.flops]:
        assert op.work == Work((105 + 28 + 4) * FP32, 60 * FP32, 2 * 15 * 7 * 4), op.name
    q, k = torch.ones(2, 4, 5, 16), torch.ones(2, 4, 5, 16)
    causal = total(counted(lambda: F.scaled_dot_product_attention(q, k, k, is_causal=True)))
    assert causal == Work(3 * 640 * FP32, 640 * FP32, 4 * 2 * 4 * 16 * (5 * 6 // 2))
    k = torch.ones(2, 2, 7, 16)  # heads share them
    grouped = total(counted(lambda: F.scaled_dot_product_attention(q, k, k, enable_gqa=True)))
    assert grouped == Work((640 + 2 * 448) * FP32, 640 * FP32, 4 * 2 * 4 * 16 * 5 * 7)


def test_our_attention_reads_only_what_is_attended_to():
    q, cache = torch.ones(2, 4, 1, 16), torch.zeros(9, 2, 8, 16)
    lens, blocks = torch.tensor([3, 17], dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int32)
    plain = total(counted(lambda: attention_decode(q, cache, cache, lens, block_table=blocks)))
    key = 2 * 2 * 16 * FP32  # a key and its value, of two heads
    entries = (1 + 3) * 4
    assert plain == Work(128 * FP32 + 2 * 4 + 20 * key + entries, 128 * FP32, 4 * 20 * 4 * 16)
    windowed = total(counted(lambda: attention_decode(q, cache, cache, lens, block_table=blocks, window=5)))
    assert plain.read - windowed.read == 12 * key and windowed.flops == 4 * 8 * 4 * 16

    q, k = torch.ones(2, 4, 3, 16), torch.ones(2, 2, 7, 16)
    causal = total(counted(lambda: attention(q, k, k)))
    assert causal == Work((384 + 2 * 448) * FP32, 384 * FP32, 4 * 2 * 4 * 16 * (5 + 6 + 7))
    windowed = total(counted(lambda: attention(q, k, k, window=2)))
    assert windowed == Work((384 + 2 * 448 * 4 // 7) * FP32, 384 * FP32, 4 * 2 * 4 * 16 * 3 * 2)  # keys 3 to 6
    start, end = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([7, 4], dtype=torch.int32)
    padded = total(counted(lambda: attention(q, k, k, key_start=start, key_end=end)))
    pairs = (4 + 5 + 6) + (2 + 3 + 4)
    assert padded.flops == 4 * 4 * 16 * pairs
    assert padded.read == (384 + 2 * (6 + 4) * 2 * 16) * FP32


def test_the_fused_step_writes_its_slots_alone():
    rows, hidden, cache = 3, 32, torch.zeros(5, 2, 8, 16)
    x, weight = torch.ones(rows, hidden), torch.ones((4 + 2 * 2) * 16, hidden)
    cos, slots = torch.ones(rows, 16), torch.arange(rows)
    ops = counted(
        lambda: norm_qkv_rope_op(x, torch.ones(hidden), weight, None, cos, cos, cache, cache.clone(), slots, 1e-6, 4)
    )
    work = next(op.work for op in ops if op.name == "llama_fast::norm_qkv_rope")
    assert work.read == (rows * hidden + hidden + weight.numel() + 2 * rows * 16) * FP32 + rows * INT64
    assert work.written == (rows * 4 * 16 + 2 * rows * 2 * 16) * FP32
    assert work.flops == 2 * rows * hidden * weight.shape[0]
