"""The choice of tokens by the kernels: beside PyTorch's ops for thousands of rows, at every edge, and alone as in a batch."""

import math
import struct

import pytest
import torch

from llama_fast.kernels import cpu, sampling_pytorch
from llama_fast.kernels.launch import INTERPRETED
from llama_fast.kernels.sampling import sample
from llama_fast.kernels.sampling_pytorch import PRODUCED
from tests.parity import DTYPES, not_interpreted

INF, NAN = math.inf, math.nan
PROMPT, OUTPUT = [1, 2, 2, 7], [3, 3, 9, 2]


def numbers_of(rows, vocab, device):
    """The table `numbers` of rows given as what differs from a plain draw."""
    lines = []
    for seed, row in enumerate(rows):
        reals = [row.get("temperature", 1.0), row.get("top_p", 1.0), math.log(row["min_p"]) if "min_p" in row else -INF]
        reals += [row.get("repetition", 1.0), row.get("presence", 0.0), row.get("frequency", 0.0)]
        bits = [struct.unpack("<q", struct.pack("<d", real))[0] for real in reals]
        integers = [row.get("seed", seed), row.get("produced", 0), min(row.get("top_k", vocab), vocab)]
        lines.append([*bits, *integers, row.get("min_tokens", 0)])
    return torch.tensor(lines, device=device)


def needs_of(rows, vocab):
    top_k = [min(row.get("top_k", vocab), vocab) for row in rows]
    widths = [k if k < vocab else vocab * (row.get("top_p", 1.0) < 1) for k, row in zip(top_k, rows, strict=True)]
    random = any(row.get("temperature", 1.0) > 0 for row in rows)
    return dict(random=random, width=max(widths) if random else 0, min_p=any("min_p" in row for row in rows))


def tables_of(rows, vocab, device):
    """Each as it is asked for by any row, and left out where none does."""
    n = len(rows)
    tables = dict.fromkeys(("bias", "in_prompt", "counts", "ending"))
    if any("bias" in row for row in rows):
        tables["bias"] = torch.zeros(n, vocab, device=device)
    if any(row.keys() & {"repetition", "presence", "frequency"} for row in rows):
        tables["in_prompt"] = torch.zeros(n, vocab, dtype=torch.bool, device=device)
        tables["counts"] = torch.zeros(n, vocab, dtype=torch.int32, device=device)
    if any("min_tokens" in row for row in rows):
        tables["ending"] = torch.zeros(n, vocab, dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        if "bias" in row:
            tables["bias"][i, torch.tensor([*row["bias"]]) % vocab] = torch.tensor([*row["bias"].values()]).to(device)
        if row.keys() & {"repetition", "presence", "frequency"}:
            tables["in_prompt"][i, torch.tensor(PROMPT) % vocab] = True
            for token in OUTPUT:
                tables["counts"][i, token % vocab] += 1
        if "min_tokens" in row:
            tables["ending"][i, :: max(1, vocab // 3)] = True
    return tables


def both(logits, rows):
    """What kernels and PyTorch's ops choose, after checking that they left everything else alike."""
    device, vocab = logits.device, logits.shape[1]
    found = []
    for how in (sample, sampling_pytorch.sample):
        numbers, tables = numbers_of(rows, vocab, device), tables_of(rows, vocab, device)
        last_tokens = torch.full((len(rows),), -1, device=device)
        order = torch.arange(len(rows), device=device).flip(0)
        with torch.inference_mode():
            tokens = how(logits[order], order, numbers, **tables, last_tokens=last_tokens, **needs_of(rows, vocab))
        assert torch.equal(last_tokens[order], tokens)
        found.append((tokens.flip(0), numbers, tables["counts"]))
    (tokens, numbers, counts), (expected, expected_numbers, expected_counts) = found
    assert torch.equal(numbers, expected_numbers)
    assert counts is None or torch.equal(counts.sum(1), expected_counts.sum(1))
    return tokens, expected


def random_rows(count, generator):
    """Rows that ask for anything, or nothing."""

    def number(low, high):
        return low + (high - low) * float(torch.rand((), generator=generator))

    def row():
        asked = (torch.rand(9, generator=generator) < 0.4).tolist()
        every = dict(
            temperature=0.0 if number(0, 1) < 0.2 else number(0.2, 3), top_k=int(2 ** number(0, 12)),
            top_p=number(0.01, 1), min_p=10 ** number(-4, 0), repetition=number(0.5, 2), presence=number(-2, 2),
            frequency=number(-2, 2), min_tokens=int(number(0, 4)), bias={3: number(-5, 5), 5: -INF, 11: number(-5, 5)},
        )  # fmt: skip
        few = {name: value for (name, value), wanted in zip(every.items(), asked, strict=True) if wanted}
        return few | dict(seed=int(number(-(2**52), 2**52)), produced=int(number(0, 4)))

    return [row() for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [16, 200, 1136, 8193, 32000])
def test_tokens_are_those_of_pytorchs_ops(vocab, dtype, device):
    """In bfloat16 most scores have equals. Of a million rows a few differ: where a draw, or top-p, ends within an ulp of exp."""
    generator = torch.Generator().manual_seed(vocab)
    count = 4 if INTERPRETED else min(400, 2_000_000 // vocab)
    for spread in (0.1, 3.0, 10.0):  # a nucleus of nearly all tokens, of some, and of one
        logits = (torch.randn(count, vocab, generator=generator) * spread).to(device, dtype)
        tokens, expected = both(logits, random_rows(count, generator))
        assert torch.equal(tokens, expected), (tokens != expected).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    "asked", [dict(top_k=5), dict(top_p=0.6), dict(min_p=0.5), dict(top_k=9, top_p=0.8), {}], ids=str
)
def test_what_is_drawn_is_all_that_is_kept(asked, device):
    """So many draws from a flat distribution with ties that each token kept is among them, and none else."""
    count = 30 if INTERPRETED else 3000
    logits = torch.tensor([0.0, 0.3, 0.2, 0.3, -INF, 0.1, 0.2, 0.2, -0.5, 0.0, -0.9, 0.3], device=device)
    tokens, expected = both(logits.expand(count, -1), [asked | dict(seed=seed) for seed in range(count)])
    assert torch.equal(tokens, expected)
    kept = {(5,): {1, 2, 3, 6, 7, 11}, (0.6,): {1, 2, 3, 6, 7, 11}, (0.5,): {*range(12)} - {4, 8, 10}}
    kept |= {(9, 0.8): {1, 2, 3, 5, 6, 7, 11}, (): {*range(12)} - {4}}
    if not INTERPRETED:
        assert set(tokens.tolist()) == kept[tuple(asked.values())]


def test_of_ties_at_the_border_of_top_k_top_p_counts_as_many_as_there_is_room_for(device):
    """0.7 of the probabilities 1 and e^-1 is less than the first; of 1 and four times e^-1 it would not be."""
    logits = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0], device=device)
    tokens, expected = both(logits.expand(20, -1), [dict(top_k=2, top_p=0.7)] * 20)
    assert tokens.tolist() == expected.tolist() == [1] * 20


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 9000])
def test_one_token_is_left(vocab, device):
    last = torch.full((1, vocab), -INF, device=device)
    last[0, -1] = -3.0
    ways = [{}, dict(temperature=0.0), dict(top_k=1), dict(top_k=7), dict(top_p=1e-9), dict(top_p=0.9), dict(min_p=1.0)]
    ways += [dict(repetition=2.0, presence=1.0), dict(temperature=1e-5, top_k=3, top_p=0.5, min_p=0.1)]
    for logits in (last, -3.0 + 0 * last.nan_to_num(neginf=-9.0).cumsum(1)):
        only = logits.isfinite().sum() == 1
        tokens, expected = both(logits.expand(len(ways), -1), ways)
        assert torch.equal(tokens, expected)
        assert not only or tokens.tolist() == [vocab - 1] * len(ways)


def test_a_single_kept_token_is_the_first_largest_or_one_of_its_equals(device):
    logits = torch.randn(4, 1136, device=device)
    logits[:, 700] = logits[:, 90] = 9.0
    tokens, _ = both(logits, [dict(temperature=0.0), dict(top_k=1), dict(top_p=1e-12), dict(min_p=1.0)])
    assert tokens[0] == 90 and set(tokens.tolist()) <= {90, 700}
    logits[:, 700] = 8.0
    tokens, _ = both(logits, [dict(temperature=0.0), dict(top_k=1), dict(top_p=1e-12), dict(min_p=1.0)])
    assert tokens.tolist() == [90] * 4


@pytest.mark.parametrize("vocab", [40, 9000])
def test_zeros_are_equal_and_nan_is_the_largest(vocab, device):
    """As `argmax` has it. A draw from scores with NaN or +inf has no meaning: it takes the largest too."""
    zeros = torch.full((1, vocab), -1.0, device=device)
    zeros[0, 20:30] = torch.tensor([-0.0, 0.0], device=device).repeat(5)
    assert both(zeros, [dict(temperature=0.0)])[0].tolist() == [20]
    drawn, expected = both(zeros.expand(50, -1), [dict(top_k=2)] * 50)
    assert torch.equal(drawn, expected)
    largest = torch.randn(3, vocab, device=device)
    largest[0, [25, 30]] = NAN
    largest[1, [5, 35]] = torch.tensor([INF, -NAN], device=device)
    largest[2, [9, 30]] = INF
    tokens, expected = both(largest, [dict(temperature=0.0)] * 3)
    assert tokens.tolist() == expected.tolist() == [25, 35, 9]
    if INTERPRETED or device.type == "cuda" or cpu.chosen() != "pytorch":
        numbers = numbers_of([dict(top_k=4, top_p=0.5)] * 3, vocab, device)
        tokens = sample(largest, torch.arange(3, device=device), numbers, random=True, width=4)
        assert tokens.tolist() == [25, 35, 9]


def test_any_seed_and_index(device):
    ends = [-(2**63), -1, 0, 1, 2**63 - 1]
    rows = [dict(seed=seed, produced=produced) for seed in ends for produced in (0, 1, 2**31, 2**40)]
    tokens, expected = both(torch.zeros(len(rows), 1000, device=device), rows)
    assert torch.equal(tokens, expected) and len(set(tokens.tolist())) > 15


def test_rows_of_any_stride_and_a_padding_row_given_twice(device):
    wide = torch.randn(4, 300, device=device)
    numbers = numbers_of([dict(temperature=0.0)] * 3, 100, device)
    rows = torch.tensor([1, 0, 2, 2], device=device)
    for logits in (wide[:, :100], wide[:, 100:200], wide[:, ::3]):
        assert torch.equal(sample(logits, rows, numbers), logits.argmax(1))
    assert numbers[:2, PRODUCED].tolist() == [3, 3]


@not_interpreted
@pytest.mark.parametrize("vocab", [1136, 20000])
def test_a_row_alone_has_the_tokens_it_has_in_a_batch(vocab, device):
    """Bit by bit, whatever its neighbours ask for, on any number of threads."""
    generator = torch.Generator().manual_seed(5)
    rows = random_rows(60, generator)
    logits = torch.randn(60, vocab, generator=generator).to(device) * 4
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together, _ = both(logits, rows)
    finally:
        torch.set_num_threads(threads)
    for i, row in enumerate(rows):
        alone, _ = both(logits[i : i + 1], [dict(seed=i) | row])
        assert alone.tolist() == [together[i]], row


def test_what_does_not_fit_is_named(device):
    logits, rows = torch.zeros(2, 5, device=device), torch.arange(2, device=device)
    numbers = numbers_of([{}, {}], 5, device)
    with pytest.raises(TypeError, match="logits"):
        sample(rows[:, None], rows, numbers)
    for wrong, named in (
        ((logits[0], rows, numbers), "logits"),
        ((logits[:, :0], rows, numbers), "logits"),
        ((logits, rows[:1], numbers), "rows"),
        ((logits, rows, numbers[:, :9]), "numbers"),
    ):
        with pytest.raises(ValueError, match=named):
            sample(*wrong)
    with pytest.raises(ValueError, match="in_prompt and counts"):
        sample(logits, rows, numbers, counts=torch.zeros(2, 5, dtype=torch.int32, device=device))
