"""What the checks find, what is left alone, and how it is reported."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import OlmoConfig, OlmoForCausalLM

import llama_fast
from llama_fast import ops
from llama_fast.fusion import layers
from llama_fast.fusion.causal_lm import FusedCausalLM
from llama_fast.fusion.swap import Fused
from tests.fusion.models import SIZES, generate, logits, make, random_ids
from tests.parity import not_interpreted

pytestmark = not_interpreted


def wrong_norm(x, weight, eps=1e-6, *, residual=None, offset=0.0):
    h = x if residual is None else x + residual
    y = F.rms_norm(h, h.shape[-1:], weight + offset, 10 * eps)  # another eps
    return y if residual is None else (y, h)


def wrong_rope(q, k, cos, sin, **_):
    return ROPE(q, k, cos, -sin)  # turned the other way


def wrong_attention(q, k, v, *, causal=True, **options):
    return ATTENTION(q, k, v, causal=causal, **(options | dict(scale=1.01 * options["scale"])))


def wrong_linear(x, weight, bias=None, *, residual=None, **_):
    y = F.linear(x, weight, bias)
    return y if residual is None else y + 0.99 * residual


def wrong_loss(hidden, weight, labels, **options):
    return LOSS(hidden, weight, labels, **options) + 1e-4  # only the loss, not its gradient


def wrong_gradient(gate, up):
    return F.silu(gate).detach() * up


ROPE, ATTENTION, LOSS = ops.rope, ops.attention, ops.linear_cross_entropy
ATTENTION_DECODE = ops.attention_decode
WRONG = {
    "rms_norm": (wrong_norm, "norm"),
    "swiglu": (lambda gate, up: F.silu(up) * gate, "mlp"),
    "swiglu backward": (wrong_gradient, "mlp"),
    "rope": (wrong_rope, "rope"),
    "attention": (wrong_attention, "attention"),
    "linear": (wrong_linear, "residual"),
    "linear_cross_entropy": (wrong_loss, "loss"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_op_is_caught(name, device, monkeypatch):
    op, kind = WRONG[name]
    model, ids = make(device=device), random_ids(device=device)
    before = logits(model, ids)
    monkeypatch.setattr(ops, name.split()[0], op)
    report = llama_fast.fuse(model, mode="training")
    assert report.count(kind) == 0
    reasons = [left.reason for left in report.left if left.kind == kind]
    assert reasons and all("is off by" in reason for reason in reasons)
    torch.testing.assert_close(logits(model, ids), before)


def test_without_checks_structure_decides(device, monkeypatch):
    monkeypatch.setattr(ops, "swiglu", WRONG["swiglu"][0])
    report = llama_fast.fuse(make(device=device), verify=False)
    assert report.count("mlp") == 2
    assert report.largest_error() is None


def test_one_wrong_layer_is_left_and_the_others_are_swapped(device):
    model, ids = make(device=device), random_ids(device=device)

    class Doubled(type(model.model.layers[1].mlp)):
        def forward(self, x):
            return 2.0 * super().forward(x)

    model.model.layers[1].mlp.__class__ = Doubled
    before = logits(model, ids)
    report = llama_fast.fuse(model)
    (left,) = report.left
    assert (left.name, left.kind) == ("model.layers.1.mlp", "mlp")
    assert left.reason == "it is not down(act(gate) * up): perhaps it clamps or drops out"
    assert type(model.model.layers[1].mlp) is Doubled
    assert report.count("residual") == 2
    torch.testing.assert_close(logits(model, ids), before)


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_bfloat16_masks_are_checked_too(family, device, monkeypatch):
    """In bfloat16 a wrong attention must not drown in the residual stream, where a layer can only be checked as a whole."""
    monkeypatch.setattr(ops, "attention", lambda q, k, v, *, causal=True, **o: ATTENTION(q, k, v, causal=False, **o))
    report = llama_fast.fuse(make(family, device, torch.bfloat16))
    assert report.count("attention") == 0


def test_padding_is_checked_too(device, monkeypatch):
    monkeypatch.setattr(ops, "attention", lambda q, k, v, *, key_start=None, **o: ATTENTION(q, k, v, **o))
    assert llama_fast.fuse(make(device=device)).count("attention") == 0


def is_called(branch, options):
    """Whether a call of `ops.attention` is of a branch; only the ranges of a static cache end before the keys do."""
    mask, end = options.get("mask"), options.get("key_end")
    return {
        "padding on the right": mask is not None and options.get("causal", True),
        "packed": mask is not None and not options.get("causal", True),
        "static cache": end is not None and int(end.max()) < options["keys"],
        "chunk": options["queries"] > 1 and options["keys"] > options["queries"] and end is None,
    }[branch]


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("branch", ["one query", "padding on the right", "packed", "static cache", "chunk"])
def test_every_branch_is_checked(branch, mode, device, monkeypatch):
    """What is wrong only there, a little, is noticed."""

    def attention(q, k, v, **options):
        out = ATTENTION(q, k, v, **options)
        sizes = dict(queries=q.shape[2], keys=k.shape[2])
        return 1.001 * out if branch != "one query" and is_called(branch, options | sizes) else out

    def attention_decode(*args, **options):
        return (1.001 if branch == "one query" else 1.0) * ATTENTION_DECODE(*args, **options)

    monkeypatch.setattr(ops, "attention", attention)
    monkeypatch.setattr(ops, "attention_decode", attention_decode)
    report = llama_fast.fuse(make(device=device), mode=mode)
    assert report.count("attention") == 0 and report.count("rope") == 2
    assert all("is off by" in left.reason for left in report.left)


@pytest.mark.parametrize("name", ["rope", "swiglu", "linear", "norm_heads", "layer_tail"])
def test_a_single_token_is_checked_too(name, device, monkeypatch):
    """For which there are other kernels. (Qwen3 norms its heads, so its attention has none.)"""
    where = ops if hasattr(ops, name) else layers
    op = getattr(where, name)

    def wrong(x, *args, **options):
        tokens = x.shape[2] if name == "rope" else x.shape[:-1].numel() // (2 if x.shape[0] == 2 else 1)
        if tokens != 1:
            return op(x, *args, **options)
        if name == "norm_heads":  # which norms what it is given
            q, k, v = op(x, *args, **options)
            return 1.001 * q, k, 1.001 * v
        return op(1.001 * x, *args, **options)

    monkeypatch.setattr(where, name, wrong)
    report = llama_fast.fuse(make("qwen3" if name == "linear" else "llama", device))
    assert report.count({"rope": "rope", "swiglu": "mlp"}.get(name, "residual")) == 0


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "head_dim", [2, 10, 16, 256, 258, *(pytest.param(size, marks=pytest.mark.nightly) for size in (8, 12, 34))]
)
def test_no_size_that_is_taken_fails_later(head_dim, verify, device):
    """Not in generating either, where one query has another kernel than a prompt."""
    plain, fused = make(device=device, head_dim=head_dim), make(device=device, head_dim=head_dim)
    ids = random_ids(device=device)
    report = llama_fast.fuse(fused, verify=verify)
    for cache in (None, "static"):
        options = dict(max_new_tokens=4, cache_implementation=cache)
        assert torch.equal(generate(fused, ids, **options), generate(plain, ids, **options))
    assert report.count("attention") == 2 or any("head_dim must be" in left.reason for left in report.left)
    assert report.count("rope") == report.count("residual") == 2


def test_a_check_that_checks_nothing_fails(device, monkeypatch):
    monkeypatch.setattr(FusedCausalLM, "_has_plain_loss", lambda self: False)
    (left,) = llama_fast.fuse(make(device=device), mode="training").left
    assert left.reason == "its check failed: its loss was computed from its logits"


def test_a_failing_op_is_a_reason(device, monkeypatch):
    def refuse(q, k, v, **options):
        if q.device.type != "meta":  # where sizes are asked for
            raise ValueError("not for this shape")

    monkeypatch.setattr(ops, "attention", refuse)
    report = llama_fast.fuse(make(device=device))
    assert {left.reason for left in report.left if left.kind == "attention"} == {"its check failed: not for this shape"}


def test_an_error_leaves_the_model_as_it_was(device, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    model = make(device=device)
    config = model.config
    monkeypatch.setattr(ops, "attention", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llama_fast.fuse(model)
    assert not any(isinstance(module, Fused) for module in model.modules())
    assert model.config is config


def test_unknown_structures_are_left_with_a_reason(device):
    """OLMo's norms have no weight: the rest of the model is swapped."""
    model = OlmoForCausalLM(OlmoConfig(**SIZES)).to(device).eval()
    ids = random_ids(device=device)
    before = logits(model, ids)
    report = llama_fast.fuse(model)
    assert report.count("norm") == 0
    assert report.count("mlp") == report.count("rope") == report.count("attention") == report.count("residual") == 2
    torch.testing.assert_close(logits(model, ids), before)


@pytest.mark.parametrize(
    ("family", "settings", "off"),
    [
        (
            "Granite",
            dict(residual_multiplier=0.5, logits_scaling=2.0),
            {"residual", "loss"},
        ),  # scales its sums and logits
        ("Cohere", {}, {"rope", "loss"}),  # rotates neighbours, and scales its logits
    ],
)
def test_known_structures_that_compute_something_else_are_left(family, settings, off, device):
    config = getattr(transformers, f"{family}Config")(**SIZES, **settings)
    model, ids = getattr(transformers, f"{family}ForCausalLM")(config).to(device).eval(), random_ids(device=device)
    before = logits(model, ids)
    report = llama_fast.fuse(model, mode="training")
    assert {left.kind for left in report.left if "is off by" in left.reason} == off, str(report)
    assert report.count("mlp") == report.count("attention") == 2
    torch.testing.assert_close(logits(model, ids), before)


class ClampingMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(32, 32) for _ in range(3))
        self.act_fn, self.limit, self.dropout = nn.SiLU(), 10.0, 0.0

    def forward(self, x):
        gated = self.act_fn(self.gate_proj(x).clamp(max=self.limit)) * self.up_proj(x)
        return F.dropout(self.down_proj(gated), self.dropout, self.training)


def test_what_random_input_does_not_show_in_an_mlp():
    """DeepSeek V4 clamps, Seed-OSS drops out: neither shows in a check in eval mode on numbers around one."""
    mlp = ClampingMLP().eval()
    torch.manual_seed(5)
    (left,) = llama_fast.fuse(mlp, verify=False).left
    assert left.reason == "it is not down(act(gate) * up): perhaps it clamps or drops out"
    mlp.limit, mlp.dropout = float("inf"), 0.1
    (left,) = llama_fast.fuse(mlp, verify=False).left
    assert left.reason == "it is not down(act(gate) * up): perhaps it clamps or drops out"
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.rand(3), expected), "the dropout of the trial must not move PyTorch's generator"
    mlp.dropout = 0.0
    assert llama_fast.fuse(mlp, verify=False).count("mlp") == 1


class Swish(nn.Module):
    def __init__(self, beta, *, learned=False):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(beta)) if learned else beta

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


@pytest.mark.parametrize("learned", [False, True])
def test_an_activation_with_settings_is_left(learned):
    """It is SiLU today, and may be something else tomorrow."""
    mlp = ClampingMLP().eval()
    mlp.limit, mlp.act_fn = float("inf"), Swish(1.0, learned=learned)
    (left,) = llama_fast.fuse(mlp).left
    assert left.reason == "its activation has settings of its own: beta"


def test_queries_that_are_clipped_are_noticed(device):
    """By a bound that random input does not reach."""
    model = OlmoForCausalLM(OlmoConfig(**SIZES, clip_qkv=1.0)).to(device).eval()
    assert model.model.layers[0].self_attn.q_proj(torch.randn(64, 64, device=device)).abs().max() < 1
    report = llama_fast.fuse(model)
    assert report.count("rope") == 0
    assert all("is off by" in left.reason for left in report.left if left.kind == "rope")


def test_queries_that_are_scaled_far_from_the_start_are_noticed(device):
    """Ministral 3 scales its queries from `original_max_position_embeddings` on: not at the positions of a short check."""
    rope = dict(
        rope_type="yarn", rope_theta=1e4, factor=16.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.5,
        beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
    )  # fmt: skip
    config = transformers.Ministral3Config(**(SIZES | dict(rope_parameters=rope)))
    model = transformers.Ministral3ForCausalLM(config).to(device).eval()
    ids = random_ids(length=40, device=device)
    before = logits(model, ids)
    report = llama_fast.fuse(model)
    assert (report.count("rope"), report.count("attention")) == (0, 2)
    torch.testing.assert_close(logits(model, ids), before)


def test_dropout_of_its_own_is_not_lost(device):
    config = transformers.Starcoder2Config(**SIZES, residual_dropout=0.1)
    report = llama_fast.fuse(transformers.Starcoder2ForCausalLM(config).to(device))
    reasons = {left.reason for left in report.left if left.kind == "rope"}
    assert reasons == {"it drops out of its output: residual_dropout is 0.1"}


def test_experts_are_left_alone_and_the_rest_is_swapped(device):
    """With transformers' default for experts, which has no float64."""
    config = transformers.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    model, ids = transformers.Qwen3MoeForCausalLM(config).to(device).eval(), random_ids(device=device)
    before = logits(model, ids)
    report = llama_fast.fuse(model)
    assert not report.left, str(report)
    assert report.count("rope") == report.count("attention") == report.count("residual") == 2
    assert report.count("mlp") == 0
    torch.testing.assert_close(logits(model, ids), before)


def test_an_encoder_keeps_its_attention(device):
    """T5's norms are swapped; they return the dtype of their weight, which half precision beside float32 depends on."""
    config = transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=112, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model, ids = transformers.T5ForConditionalGeneration(config).to(device).eval(), random_ids(device=device)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if ".wo." in name else parameter.data.bfloat16()
    before = logits(model, ids, decoder_input_ids=ids)
    report = llama_fast.fuse(model)
    assert {left.reason for left in report.left} == {"the model has an encoder"}
    assert report.count("norm") == 12
    torch.testing.assert_close(logits(model, ids, decoder_input_ids=ids), before, rtol=0.02, atol=0.02)


def test_plain_modules(device):
    """No transformers model: its norms are swapped, and what only looks like one is not."""

    class MeanNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, x):
            return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps)

    class GatedNorm(MeanNorm):
        def forward(self, x, gate=None):
            return self.weight * F.rms_norm(x if gate is None else x * F.silu(gate), x.shape[-1:], None, self.eps)

    model = nn.Sequential(
        nn.LayerNorm(32), nn.RMSNorm(32), nn.LayerNorm(32, bias=False), nn.RMSNorm(32, eps=1e-3, elementwise_affine=False),
        nn.Linear(32, 32), nn.LayerNorm((4, 32)), MeanNorm(), GatedNorm(),
    ).to(device)  # fmt: skip
    x = torch.randn(2, 4, 32, device=device)
    before = model(x)
    report = llama_fast.fuse(model, mode="training")
    assert report.count("norm") == 4
    assert {left.name: left.reason for left in report.left} == {
        "5": "it norms over 2 dimensions, not one",
        "6": "it is no RMSNorm: neither its weight nor 1 + weight gives its output",
        "7": "its forward takes more than one tensor: x, gate",
    }
    torch.testing.assert_close(model(x), before)
    llama_fast.unfuse(copy.deepcopy(model))


def test_norms_in_another_dtype(device):
    """Llama's norm gives the wider dtype of the two, Gemma's that of its input."""
    for family, expected in (("llama", torch.float32), ("gemma", torch.bfloat16)):
        model = make(family, device)
        llama_fast.fuse(model)
        x = torch.randn(2, 64, device=device, dtype=torch.bfloat16)
        assert model.model.norm(x).dtype == expected


def test_strange_projections_are_named(device):
    class QuantisedLinear(nn.Linear):
        pass

    model = make(device=device)
    model.model.layers[0].mlp.gate_proj.__class__ = QuantisedLinear
    model.model.layers[1].self_attn.q_proj.__class__ = QuantisedLinear
    report = llama_fast.fuse(model)
    assert {(left.name, left.reason) for left in report.left} == {
        ("model.layers.0.mlp", "its gate_proj is tests's QuantisedLinear, not nn.Linear"),
        ("model.layers.1.self_attn", "its q_proj is tests's QuantisedLinear, not nn.Linear"),
    }


def test_parameters_elsewhere_are_named():
    report = llama_fast.fuse(make(device="meta"))
    assert not report.swapped
    assert any("on meta, where there are no kernels" in left.reason for left in report.left)


def test_the_report_prints_as_a_table(device):
    report = llama_fast.fuse(make("gemma2", device), mode="training")
    text = str(report)
    for word in ("mode='training'", "norm", "attention", "largest error", "model.layers.0 and 1 more", "residual"):
        assert word in text
    worst = report.largest_error("mlp")
    assert worst.kind == "mlp"
    assert f"{worst.error:.1e}" in text and f"{worst.peer_error:.1e}" in text
    assert report.table().row_count == 6
