"""The choice of tokens: each warper against transformers' processor, draws against the exact distribution, and independence."""

import math
from dataclasses import replace

import numpy
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from llama_fast.engine.sampling import Needs, Sampler, SamplingParams, logprobs_of
from llama_fast.kernels import sampling_pytorch
from llama_fast.kernels.sampling_pytorch import _mix, draw, uniform

VOCAB = 50
PROMPT, OUTPUT = [1, 2, 2, 7], [3, 3, 9, 2]
EOS = (0,)


def sampler_for(
    *params: SamplingParams, device: torch.device, vocab: int = VOCAB, output=OUTPUT
) -> tuple[Sampler, Needs]:
    sampler = Sampler(vocab, len(params), eos_ids=EOS, device=device)
    for row, each in enumerate(params):
        sampler.add(row, each, seed=each.seeds()[0], prompt_ids=PROMPT, output_ids=output)
    return sampler, sampler.needs(range(len(params)))


def scores_of(logits: Tensor, params: SamplingParams, **how) -> Tensor:
    """The scores that PyTorch's ops draw from, for rows that all ask for `params`."""
    captured = []

    def keep(scores: Tensor, _: Tensor) -> Tensor:
        captured.append(scores)
        return scores.argmax(-1)

    sampler, needs = sampler_for(*[params] * len(logits), device=logits.device, vocab=logits.shape[1], **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_fast.engine.sampling.sample", sampling_pytorch.sample)
        patch.setattr(sampling_pytorch, "draw", keep)
        sampler.sample(logits, torch.arange(len(logits), device=logits.device), needs)
    return captured[0]


def as_logprobs(scores: Tensor) -> Tensor:
    return scores.double().log_softmax(-1)


@pytest.fixture
def logits(device: torch.device) -> Tensor:
    return torch.randn(6, VOCAB, device=device) * 3


WARPERS = [
    (dict(temperature=0.3), [theirs.TemperatureLogitsWarper(0.3)]),
    (dict(top_k=1), [theirs.TopKLogitsWarper(1)]),
    (dict(top_k=7), [theirs.TopKLogitsWarper(7)]),
    (dict(top_k=10**6), [theirs.TopKLogitsWarper(10**6)]),
    (dict(top_p=0.8), [theirs.TopPLogitsWarper(0.8)]),
    (dict(top_p=1e-6), [theirs.TopPLogitsWarper(1e-6)]),
    (dict(min_p=0.07), [theirs.MinPLogitsWarper(0.07)]),
    (dict(min_p=1.0), [theirs.MinPLogitsWarper(1.0)]),
    (dict(repetition_penalty=1.7), [theirs.RepetitionPenaltyLogitsProcessor(1.7)]),
    (dict(repetition_penalty=0.5), [theirs.RepetitionPenaltyLogitsProcessor(0.5)]),
    (dict(logit_bias={4: 5.0, 2: -1.5}), [theirs.SequenceBiasLogitsProcessor({(4,): 5.0, (2,): -1.5})]),
    (dict(banned_token_ids=[5, 6]), [theirs.SuppressTokensLogitsProcessor([5, 6])]),
    (dict(allowed_token_ids=[5, 6, 40]), [theirs.PrefixConstrainedLogitsProcessor(lambda *_: [5, 6, 40], 1)]),
    (dict(min_tokens=5, stop_token_ids=[8]), [theirs.MinNewTokensLengthLogitsProcessor(4, 5, [0, 8])]),
    (dict(min_tokens=4, stop_token_ids=[8]), [theirs.MinNewTokensLengthLogitsProcessor(4, 4, [0, 8])]),
    (
        dict(logit_bias={4: 5.0}, repetition_penalty=1.3, temperature=1.4, top_k=20, top_p=0.9, min_p=0.05),
        [
            theirs.SequenceBiasLogitsProcessor({(4,): 5.0}),
            theirs.RepetitionPenaltyLogitsProcessor(1.3),
            theirs.TemperatureLogitsWarper(1.4),
            theirs.TopKLogitsWarper(20),
            theirs.TopPLogitsWarper(0.9),
            theirs.MinPLogitsWarper(0.05),
        ],
    ),
]


@pytest.mark.parametrize(("params", "processors"), WARPERS, ids=lambda value: str(value)[:60])
def test_a_warper_leaves_the_distribution_transformers_leaves(logits, params, processors) -> None:
    ids = torch.tensor([PROMPT + OUTPUT] * len(logits), device=logits.device)
    expected = logits
    for processor in processors:
        expected = processor(ids, expected.clone())
    torch.testing.assert_close(
        as_logprobs(scores_of(logits, SamplingParams(**params))), as_logprobs(expected), rtol=1e-5, atol=1e-5
    )


def test_presence_and_frequency_count_only_the_output(logits) -> None:
    scores = scores_of(logits, SamplingParams(presence_penalty=0.7, frequency_penalty=-0.25))
    counts = torch.bincount(torch.tensor(OUTPUT), minlength=VOCAB).to(logits.device)
    expected = logits + 0.25 * counts - 0.7 * (counts > 0)
    torch.testing.assert_close(as_logprobs(scores), as_logprobs(expected), rtol=1e-5, atol=1e-5)


def test_ties_at_the_border_are_all_kept(device) -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0]], device=device).bfloat16()
    assert scores_of(logits, SamplingParams(top_k=2), output=[]).isfinite().tolist() == [
        [True, False, True, True, True]
    ]
    assert scores_of(logits, SamplingParams(top_p=0.6), output=[]).isfinite().tolist() == [
        [True, False, True, True, True]
    ]


@pytest.mark.parametrize("top_k", [0, 1500])
@pytest.mark.parametrize("spread", [0.01, 4.0])  # the nucleus is nearly the vocabulary, or a few tokens
def test_top_p_of_a_large_vocabulary_is_that_of_a_full_sort(device, spread: float, top_k: int) -> None:
    logits = torch.randn(2, 5000, device=device) * spread
    expected = theirs.TopKLogitsWarper(top_k or 5000)(None, logits)
    expected = theirs.TopPLogitsWarper(0.9)(None, expected).isfinite()
    kept = scores_of(logits, SamplingParams(top_p=0.9, top_k=top_k), output=[]).isfinite()
    # a float32 sum of 5000 terms may stop a token or two away from the exact one
    assert (kept != expected).sum() <= 4
    assert kept.sum(-1).tolist() != [5000, 5000]


def chi_square_p(observed: Tensor, probabilities: Tensor) -> float:
    """The chance of counts at least so far from `probabilities`; outcomes expected less than 5 times are one."""
    expected = probabilities.double() * observed.sum()
    often = expected >= 5
    groups = [(observed[often].double(), expected[often])]
    rest = (observed[~often].sum().double(), expected[~often].sum())
    if rest[1] >= 5:
        groups.append((rest[0][None], rest[1][None]))
    found, wanted = (torch.cat(column) for column in zip(*groups, strict=True))
    statistic = ((found - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(found) - 1) / 2).double(), statistic.cpu() / 2))


@pytest.mark.parametrize("across", ["seeds", "indices"])
@pytest.mark.parametrize(
    "params", [dict(), dict(temperature=0.5, top_k=12), dict(top_p=0.85), dict(temperature=2.0, min_p=0.1)], ids=str
)
def test_draws_follow_the_exact_distribution(device, params: dict, across: str) -> None:
    logits = (torch.randn(1, VOCAB, device=device) * 2).float()
    exact = as_logprobs(scores_of(logits, SamplingParams(**params), output=[])).exp()[0].cpu()
    count = 20000
    if across == "seeds":
        scores = scores_of(logits, SamplingParams(**params), output=[]).expand(count, -1)
        seed = torch.arange(count, device=device)
        tokens = draw(scores, uniform(seed, torch.full_like(seed, 3)))
    else:
        sampler, needs = sampler_for(SamplingParams(seed=5, **params), device=device, output=[])
        row = torch.zeros(1, dtype=torch.int64, device=device)
        tokens = torch.cat([sampler.sample(logits, row, needs).token_ids for _ in range(count // 5)])
    observed = torch.bincount(tokens.cpu(), minlength=VOCAB)
    assert (observed[exact == 0] == 0).all()
    assert chi_square_p(observed, exact) > 1e-3


def test_the_test_of_distributions_sees_a_small_bias(device) -> None:
    exact = torch.full((10,), 0.1)
    biased = torch.full((10,), 2000) + torch.tensor([200, -200] + [0] * 8)
    assert chi_square_p(biased, exact) < 1e-3


def test_the_hash_is_splitmix64() -> None:
    """The first numbers of SplitMix64's reference implementation for the seed 1234567."""
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + k * golden + 2**63) % 2**64 - 2**63 for k in (1, 2, 3)]
    assert [number % 2**64 for number in _mix(torch.tensor(states)).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_uniform_numbers_are_from_zero_to_one_and_unlike_their_neighbours(device) -> None:
    seed, index = (grid.flatten() for grid in torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij"))
    numbers = uniform(seed.to(device), index.to(device)).view(200, 200).cpu()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 * math.sqrt(1 / 12) / 200
    for shifted in (numbers[1:] - numbers[:-1], numbers[:, 1:] - numbers[:, :-1]):
        assert abs(shifted.abs().mean() - 1 / 3) < 4 * math.sqrt(1 / 18) / 190
    assert len(numbers.unique()) == numbers.numel()
    # a seed that is another's later state begins a stream of its own
    state = torch.tensor([5, 5 + 0x9E3779B97F4A7C15 - 2**64], device=device)
    ahead, behind = uniform(state, torch.tensor([1, 0], device=device)).tolist()
    assert ahead != behind


def test_the_last_number_gives_the_last_token_that_has_a_weight(device) -> None:
    scores = torch.tensor([[0.0, 0.0, -math.inf], [-math.inf, 0.0, 0.0]], device=device)
    ends = torch.tensor([1 - 2.0**-53] * 2, dtype=torch.float64, device=device)
    assert draw(scores, ends).tolist() == [1, 2]
    assert draw(scores, 0 * ends).tolist() == [0, 1]


MANY = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=2.0, frequency_penalty=0.5),
    SamplingParams(seed=2, top_k=5, temperature=1.5),
    SamplingParams(seed=3, top_p=0.7, presence_penalty=1.0),
    SamplingParams(seed=4, min_p=0.05, logit_bias={4: 3.0}, min_tokens=6),
    SamplingParams(seed=5, temperature=3.0, allowed_token_ids=[0, 1, 2], min_tokens=5),
    SamplingParams(seed=6, temperature=1e-7, banned_token_ids=[2]),
]


def test_a_requests_tokens_do_not_depend_on_what_runs_beside_it(device) -> None:
    steps = 12
    logits = torch.randn(steps, len(MANY), VOCAB, device=device) * 2
    sampler, needs = sampler_for(*MANY, device=device)
    every = torch.arange(len(MANY), device=device)
    together = torch.stack([sampler.sample(step, every, needs).token_ids for step in logits], dim=1)
    for row, params in enumerate(MANY):
        alone, own_needs = sampler_for(params, device=device)
        first = torch.zeros(1, dtype=torch.int64, device=device)
        tokens = [int(alone.sample(step[row : row + 1], first, own_needs).token_ids) for step in logits]
        assert tokens == together[row].tolist()
    assert len({tuple(row) for row in together.tolist()}) == len(MANY)


def test_a_preempted_request_goes_on_as_if_it_had_not_been(device) -> None:
    logits = torch.randn(10, 1, VOCAB, device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    for params in MANY:
        sampler, needs = sampler_for(params, device=device, output=[])
        whole = [int(sampler.sample(step, row, needs).token_ids) for step in logits]
        # the row goes to another request, whose traces must not stay, and back
        sampler.add(0, MANY[4], seed=9, prompt_ids=[5], output_ids=[11] * 3)
        sampler.add(0, MANY[5], seed=9, prompt_ids=[5])
        sampler.add(0, params, seed=params.seeds()[0], prompt_ids=PROMPT, output_ids=whole[:4])
        assert [int(sampler.sample(step, row, needs).token_ids) for step in logits[4:]] == whole[4:]


def test_a_row_taken_over_keeps_nothing_of_the_request_before(device) -> None:
    logits = torch.randn(1, VOCAB, device=device)
    sampler = Sampler(VOCAB, 2, eos_ids=EOS, device=device)
    heavy = SamplingParams(temperature=0, repetition_penalty=50.0, allowed_token_ids=[1, 2], min_tokens=3)
    for row in (0, 1):
        sampler.add(row, heavy, seed=0, prompt_ids=[int(logits.argmax())])
    sampler.add(0, SamplingParams(temperature=0), seed=0, prompt_ids=[])
    needs = sampler.needs([0, 1, sampler.padding_row])
    rows = torch.tensor([0, 1, sampler.padding_row, sampler.padding_row], device=device)
    best, held, *padding = sampler.sample(logits.expand(4, -1), rows, needs).token_ids.tolist()
    assert best == int(logits.argmax()) == padding[0] == padding[1]
    assert held in (1, 2)


def test_penalties_see_the_tokens_as_they_are_chosen(device) -> None:
    logits = torch.zeros(1, VOCAB, device=device)
    sampler, needs = sampler_for(SamplingParams(temperature=0, frequency_penalty=1.0), device=device, output=[])
    row = torch.zeros(1, dtype=torch.int64, device=device)
    chosen = [int(sampler.sample(logits, row, needs).token_ids) for _ in range(2 * VOCAB)]
    assert sorted(chosen) == sorted([*range(VOCAB)] * 2) and len(set(chosen[:VOCAB])) == VOCAB


def test_a_row_without_a_filter_keeps_all_beside_rows_with_one(device) -> None:
    sampler, needs = sampler_for(SamplingParams(seed=1), SamplingParams(seed=1, top_k=2), device=device, output=[])
    assert needs.width == 2
    logits, rows = torch.zeros(2, VOCAB, device=device), torch.arange(2, device=device)
    logits[:, :2] = 0.01
    drawn = torch.stack([sampler.sample(logits, rows, needs).token_ids for _ in range(100)]).cpu()
    assert len(drawn[:, 0].unique()) > 30 and drawn[:, 1].unique().tolist() == [0, 1]


def test_greedy_takes_the_first_of_the_largest_and_leaves_the_logits_alone(device) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0]], device=device).bfloat16()
    before = logits.clone()
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=0, logit_bias={0: 1.0})):
        sampler, needs = sampler_for(params, device=device, vocab=3, output=[])
        sampler = Sampler(3, 1, device=device)
        sampler.add(0, params, seed=0, prompt_ids=[])
        assert sampler.sample(logits, torch.zeros(1, dtype=torch.int64, device=device), needs).token_ids.tolist() == [1]
    assert torch.equal(logits, before)


def test_logprobs_are_those_of_the_raw_logits(logits) -> None:
    params = SamplingParams(temperature=0.2, top_k=3, logit_bias={7: 30.0}, logprobs=4, seed=1)
    sampler, needs = sampler_for(*[params] * len(logits), device=logits.device)
    sampled = sampler.sample(logits, torch.arange(len(logits), device=logits.device), needs)
    raw = logits.double().log_softmax(-1)
    assert sampled.token_ids.tolist() == [7] * len(logits)
    torch.testing.assert_close(sampled.logprobs.chosen.double(), raw[:, 7], rtol=1e-6, atol=1e-6)
    assert sampled.logprobs.ranks.tolist() == [1 + int((row > row[7]).sum()) for row in raw]
    values, ids = raw.topk(4)
    torch.testing.assert_close(sampled.logprobs.top.double(), values, rtol=1e-6, atol=1e-6)
    assert torch.equal(sampled.logprobs.top_ids, ids)
    ties = logprobs_of(torch.tensor([[1.0, 2.0, 2.0, 0.0]], device=logits.device), sampled.token_ids[:1] * 0 + 2, 0)
    assert ties.ranks.tolist() == [1]  # none is likelier
    assert logprobs_of(logits, sampled.token_ids, 0).top.shape == (len(logits), 0)


def test_a_batch_needs_what_its_rows_need(device) -> None:
    sampler, needs = sampler_for(*MANY, SamplingParams(logprobs=2), SamplingParams(logprobs=0), device=device)
    everything = dict(bias=True, penalties=True, min_tokens=True, random=True, width=VOCAB, min_p=True, logprobs=2)
    assert needs == Needs(**everything)
    assert sampler.needs([1]) == sampler.needs([]) == sampler.needs([sampler.padding_row]) == Needs()
    assert sampler.needs([3]) == Needs(random=True, width=8)
    assert sampler.needs([1, 2]) == Needs(penalties=True)


def test_seeds_of_several_outputs() -> None:
    seeds = SamplingParams(seed=7, n=50).seeds()
    assert seeds[0] == 7 and len(set(seeds)) == 50
    assert seeds == SamplingParams(seed=7, n=50).seeds()
    assert seeds[:3] == SamplingParams(seed=7, n=3).seeds()
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert SamplingParams().seeds() != SamplingParams().seeds()


REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
INTEGERS = ("top_k", "seed", "min_tokens", "max_tokens", "n", "logprobs", "prompt_logprobs")


def test_what_vllm_takes_is_taken() -> None:
    """And what numpy and JSON have for it. The fields then hold plain numbers and tuples, and compare."""
    assert SamplingParams(
        stop=None, stop_token_ids=None, logit_bias=None, banned_token_ids=None, allowed_token_ids=None, seed=None
    ) == SamplingParams()  # fmt: skip
    theirs = SamplingParams(
        temperature=numpy.float32(0.5), top_p=numpy.float16(0.25), min_p=0, repetition_penalty=numpy.int64(2), top_k=numpy.int32(7),
        seed=numpy.uint64(2**62), n=numpy.int8(2), min_tokens=numpy.int64(1), max_tokens=numpy.int64(9), logprobs=True,
        prompt_logprobs=numpy.int16(3), stop=iter(["a", "b"]), stop_token_ids=numpy.array([3, 4]),
        allowed_token_ids=torch.tensor([1, 2]), banned_token_ids={5}, logit_bias={"12": numpy.float32(0.5), numpy.int64(3): 1},
    )  # fmt: skip
    ours = SamplingParams(
        temperature=0.5, top_p=0.25, min_p=0.0, repetition_penalty=2.0, top_k=7, seed=2**62, n=2, min_tokens=1, max_tokens=9,
        logprobs=1, prompt_logprobs=3, stop=("a", "b"), stop_token_ids=(3, 4), allowed_token_ids=(1, 2),
        banned_token_ids=(5,), logit_bias={12: 0.5, 3: 1.0},
    )  # fmt: skip
    assert theirs == ours == replace(theirs, n=2) and theirs.seeds() == ours.seeds()
    for name in (*REALS, *INTEGERS):
        assert type(getattr(theirs, name)) is (float if name in REALS else int)
    ids = (*theirs.stop_token_ids, *theirs.allowed_token_ids, *theirs.logit_bias)
    assert {type(i) for i in ids} == {int} and {type(bias) for bias in theirs.logit_bias.values()} == {float}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=math.nan), "temperature"),
        (dict(temperature="hot"), "temperature"),
        (dict(top_p=0), "top_p"),
        (dict(top_p=1.1), "top_p"),
        (dict(top_k=-2), "top_k"),
        (dict(top_k=2.5), "top_k"),
        (dict(min_p=-0.1), "min_p"),
        (dict(repetition_penalty=0), "repetition_penalty"),
        (dict(presence_penalty=math.inf), "presence_penalty"),
        (dict(frequency_penalty=math.nan), "frequency_penalty"),
        (dict(seed=-1), "seed"),
        (dict(seed=2**63), "seed"),
        (dict(n=0), "n must"),
        (dict(max_tokens=-1), "max_tokens"),
        (dict(max_tokens=2, min_tokens=3), "min_tokens"),
        (dict(logprobs=-2), "logprobs"),
        (dict(stop=["a", ""]), "stop"),
        (dict(stop_token_ids=[-1]), "stop_token_ids"),
        (dict(allowed_token_ids=["a"]), "allowed_token_ids"),
        (dict(logit_bias={1: math.inf}), "logit_bias"),
        # what vLLM takes or fails on later: refused by name
        *(({name: value}, name) for name in REALS for value in (math.nan, -math.inf, True, None, "1", 10**400)),
        *(({name: value}, name) for name in INTEGERS for value in (False, 1.0, "1", math.nan, 2**63, [1])),
        *(({name: None}, name) for name in ("top_k", "min_tokens", "n")),
        *(({name: True}, name) for name in ("top_k", "seed", "min_tokens", "max_tokens", "n")),
        *((dict(ignore_eos=value), "ignore_eos") for value in (None, 1, "no")),
        *((dict(stop=value), "stop") for value in (5, b"a", [b"a"], "", ["a", None], [["a"]])),
        *(
            ({name: value}, name)
            for name in ("stop_token_ids", "allowed_token_ids", "banned_token_ids")
            for value in (5, "12", [1.0], [True], [None], {1: 2}, numpy.array(5), numpy.array([0.5]), [2**63])
        ),
        *(
            (dict(logit_bias=value), "logit_bias")
            for value in (
                5,
                [1],
                "1",
                {"a": 1.0},
                {"-1": 1.0},
                {"": 1.0},
                {-1: 1.0},
                {1.5: 1.0},
                {None: 1.0},
                {True: 1.0},
                {1: math.nan},
                {1: "1"},
                {1: None},
                {1: -math.inf},
            )
        ),
    ],
    ids=str,
)
def test_a_wrong_parameter_is_named(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SamplingParams(**wrong)


def test_parameters_are_checked_against_the_vocabulary() -> None:
    for name in ("logit_bias", "allowed_token_ids", "banned_token_ids", "stop_token_ids"):
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: {50: 1.0} if name == "logit_bias" else [50]}).check_vocabulary(VOCAB)
    with pytest.raises(ValueError, match="leave no token"):
        SamplingParams(allowed_token_ids=[1], banned_token_ids=[1]).check_vocabulary(VOCAB)
    with pytest.raises(ValueError, match="leave no token"):
        SamplingParams(allowed_token_ids=[]).check_vocabulary(VOCAB)
    only_end = SamplingParams(allowed_token_ids=[0, 4], stop_token_ids=[4], min_tokens=1)
    with pytest.raises(ValueError, match="min_tokens"):
        only_end.check_vocabulary(VOCAB, EOS)
    only_end.check_vocabulary(VOCAB, ())


def test_stops_and_ending_tokens() -> None:
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(stop_token_ids=[4]).ending_ids([0]) == {0, 4}
    assert SamplingParams(stop_token_ids=[4], ignore_eos=True).ending_ids([0]) == {4}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_step_can_be_captured_and_never_waits_for_the_device(device) -> None:
    sampler, needs = sampler_for(*MANY, device=device)
    expected_from, _ = sampler_for(*MANY, device=device)
    rows = torch.arange(len(MANY), device=device)
    logits = torch.randn(len(MANY), VOCAB, device=device)
    warm_up, _ = sampler_for(*MANY, device=device)
    warm_up.sample(logits, rows, needs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sampler.sample(logits, rows, needs)
    for _ in range(5):
        graph.replay()
        assert torch.equal(captured.token_ids, expected_from.sample(logits, rows, needs).token_ids)
        logits.normal_()
