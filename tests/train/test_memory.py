"""The memory ledger against what is really there, and by hand for models that do not fit here."""

import math

import pytest
import torch

from llama_fast.benchmarks.shapes import LLAMA_3_1_8B
from llama_fast.decoder.config import DecoderConfig
from llama_fast.train import lora
from llama_fast.train.config import LoraConfig, OptimizerConfig
from llama_fast.train.memory import Memory, sums_at_once, training_memory
from llama_fast.train.model import Packed, TrainedDecoder
from llama_fast.train.optimizer import GradientSum, Optimizers
from tests.parity import not_interpreted

TOKENS = 512


def small(layers: int = 3, **other: object) -> DecoderConfig:
    values = dict(
        model_type="llama", vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=TOKENS, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    return DecoderConfig.from_huggingface(values | other)


def made(config, **options):
    model = TrainedDecoder(config, **options)
    model.initialise(seed=0)
    return model


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_gradients_and_states_are_those_of_a_real_run(kind, tied):
    config = small(tie_word_embeddings=tied)
    model = made(config)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    states = Optimizers(model, OptimizerConfig(kind=kind)).states()
    counted = training_memory(config, tokens=TOKENS, optimizer=kind, sums=3)
    assert (counted.weights, counted.gradients, counted.gathered) == (weights, 3 * weights, 0)
    assert counted.states == sum(state.nbytes for name, state in states.items() if not name.endswith("/step"))


def test_so_are_those_of_adapters_and_of_bfloat16():
    model = made(small())
    whole = sum(parameter.nbytes for parameter in model.parameters())
    lora.add(model, LoraConfig(rank=4))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters, states = sum(each.numel() for each in trained), Optimizers(model, OptimizerConfig(groups=())).states()
    counted = training_memory(small(), tokens=TOKENS, adapters=adapters, weights=torch.bfloat16)
    assert (counted.weights, counted.gradients) == (whole // 2 + 4 * adapters, 4 * adapters)
    assert counted.states == sum(state.nbytes for name, state in states.items() if not name.endswith("/step"))
    halved = training_memory(small(), tokens=TOKENS, weights=torch.bfloat16)
    assert (halved.weights, halved.gradients, halved.states) == (whole // 2, whole // 2, whole)


def kept_bytes(model, tokens):
    """What the forward pass of a micro-batch keeps for backward, beside the parameters."""
    ids = torch.arange(tokens) % 300
    there = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, alive = {}, []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # or another would get its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(Packed.of(ids, [tokens // 2, tokens - tokens // 2]), ids)
    return sum(kept.values())


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_layer_keeps_for_backward_what_is_counted(dtype, recompute):
    """A layer more is asked for: what passes with one micro-batch is the same for both. A CPU's log-sum-exp may be float64."""
    there, counted = (
        [of(layers) for layers in (3, 4)] for of in (
            lambda layers: kept_bytes(made(small(layers), dtype=dtype, recompute=recompute), TOKENS),
            lambda layers: training_memory(small(layers), tokens=TOKENS, dtype=dtype, recompute=recompute).activations,
        )
    )  # fmt: skip
    assert counted[1] - counted[0] == pytest.approx(there[1] - there[0], rel=0.02)


def test_selective_keeps_what_products_and_attention_give():
    """x, of seven products all but the last, which is the next x, what was attended, and its log-sum-exp."""
    more, less = (training_memory(small(layers), tokens=TOKENS, recompute="selective").activations for layers in (4, 3))
    assert more - less == TOKENS * (4 * (64 + 64 + 32 + 32 + 64 + 64 + 176 + 176) + 4 * 4)


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 5, 8, 9])
def test_as_many_gradients_as_are_summed_pairwise(micro_batches, monkeypatch):
    parameter = torch.nn.Parameter(torch.zeros(1))
    total, most = GradientSum([parameter], exact=True), 0
    for _ in range(micro_batches):
        most = max(most, len(total._sums) + 1)  # and the one that backward has just made
        parameter.grad = torch.ones(1)
        total.add()
    assert most <= sums_at_once(micro_batches, exact=True) <= most + 1
    assert sums_at_once(micro_batches, exact=False) == 1


def test_8b_over_8_processes_by_hand():
    config = DecoderConfig.from_huggingface(LLAMA_3_1_8B.config())
    whole = training_memory(config, tokens=8192, dtype=torch.bfloat16, recompute="full")
    parted = training_memory(config, tokens=8192, dtype=torch.bfloat16, recompute="full", dp=8)
    parameters = 8_030_261_248
    assert (whole.weights, whole.states) == (4 * parameters, 8 * parameters)
    assert (parted.weights, parted.states) == (4 * math.ceil(parameters / 8), 4 * math.ceil(2 * parameters / 8))
    layer, root = 218_112_000, 2 * 128256 * 4096 + 4096
    assert parted.gathered == 4 * (root + 2 * layer + root)
    assert parted.activations == whole.activations
    cut = training_memory(config, tokens=8192, dtype=torch.bfloat16, recompute="full", dp=2, tp=4)
    others = root + 32 * 2 * 4096
    assert cut.weights == 4 * math.ceil(((parameters - others) // 4 + others) / 2)
    assert cut.activations < whole.activations


def test_it_is_told_in_one_line():
    assert str(Memory(2_000_000, 2_000_000, 4_000_000, 0, 500)) == (
        "8.00 MB: weights 2.00 MB, gradients 2.00 MB, states 4.00 MB, activations 500 B"
    )
