"""Batches: each token once an epoch, in an order that depends on the seed and the epoch, with labels that are counted beforehand."""

from collections import Counter

import numpy as np
import pytest
import torch

from llama_fast.data.shards import Shards
from llama_fast.decoder.tokenizer import Tokenizer
from llama_fast.train.batches import Batches
from llama_fast.train.config import BatchConfig


@pytest.fixture(scope="module")
def shards(corpus):
    return Shards(corpus / "train", Tokenizer(corpus / "bpe"))


def batches(shards, seed=0, **sizes):
    return Batches(shards, BatchConfig(**(dict(sequence_length=48, rows=2, micro_batches=3) | sizes)), seed=seed)


def test_an_epoch_has_each_token_once_but_the_last_few(shards):
    made = batches(shards)
    seen = Counter(
        (piece.document, piece.start + i)
        for row in range(made.rows_per_epoch) for piece in made.pieces(row) for i in range(piece.count)
    )  # fmt: skip
    assert set(seen.values()) == {1}
    assert len(seen) == made.rows_per_epoch * 48 > shards.tokens - 48


def test_rows_hold_what_their_pieces_say(shards):
    made = batches(shards)
    cursor = made.rows_per_epoch - 2  # this step begins in one epoch and ends in the next
    micro_batches = list(made.step(cursor))
    assert len(micro_batches) == 3
    for i, micro in enumerate(micro_batches):
        pieces = [piece for row in (cursor + 2 * i, cursor + 2 * i + 1) for piece in made.pieces(row)]
        packed, at = micro.packed, 0
        assert packed.cu_seqlens.tolist() == np.cumsum([0, *(piece.count for piece in pieces)]).tolist()
        assert len(packed.ids) == len(micro.labels) == 2 * 48
        for piece in pieces:
            document = shards[piece.document].astype(np.int64)
            here = slice(at, at + piece.count)
            assert packed.ids[here].tolist() == document[piece.start : piece.start + piece.count].tolist()
            assert packed.positions[here].tolist() == list(range(piece.count))
            following = [*document[1:], -100][piece.start : piece.start + piece.count]
            assert micro.labels[here].tolist() == following
            at += piece.count


def test_labels_are_counted_without_reading(shards):
    made = batches(shards)
    for cursor in (0, 1, 17, made.rows_per_epoch - 1):
        assert made.targets(cursor) == sum(int((micro.labels != -100).sum()) for micro in made.step(cursor))


def test_what_is_in_a_row_depends_on_its_number_and_the_seed_alone(shards):
    one, other = batches(shards), batches(shards, rows=1, micro_batches=1)
    assert one.pieces(7) == other.pieces(7)
    assert other.pieces(7 + one.rows_per_epoch) == one.pieces(7 + one.rows_per_epoch) != one.pieces(7)
    assert batches(shards, seed=1).pieces(7) != one.pieces(7)


def test_order_is_the_same_on_every_release(shards):
    made = batches(shards)
    assert [made.pieces(row)[0].document for row in range(0, 60, 12)] == [1, 11, 10, 9, 16]


def test_documents_of_one_token_and_of_none(shards, monkeypatch):
    tokens = [[1], [], [2, 3], [4]] * 3
    monkeypatch.setattr(Shards, "lengths", lambda self: np.array([len(each) for each in tokens]))
    monkeypatch.setattr(Shards, "__getitem__", lambda self, i: np.array(tokens[i], np.uint16))
    monkeypatch.setattr(shards, "tokens", 12)
    made = batches(shards, sequence_length=3, rows=2, micro_batches=2)
    (first, second), targets = made.step(0), made.targets(0)
    assert sorted(torch.cat((first.packed.ids, second.packed.ids)).tolist()) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert targets == sum(int((micro.labels != -100).sum()) for micro in (first, second)) == 3


def test_too_little_text_is_said(shards):
    with pytest.raises(ValueError, match=r"not one row of 100,000: make batch.sequence_length smaller"):
        batches(shards, sequence_length=100_000)
