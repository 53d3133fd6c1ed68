"""Batches: each token once an epoch, in an order that depends on the seed and the epoch, with labels that are counted beforehand."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from llama_fast.data.bpe import BpeConfig, train_tokenizer
from llama_fast.data.shards import Shards
from llama_fast.decoder.tokenizer import Tokenizer
from llama_fast.train.batches import Batches, open_documents
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


@pytest.fixture
def conversations(corpus, tmp_path):
    """Answers of 1 to 30 characters, to prompts of 1 to 5: from 4 tokens to some 38."""
    lines = [dict(prompt="q" * (1 + i % 5), response="xyz"[i % 3] * (1 + i * 7 % 30)) for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = train_tokenizer(["a"], tmp_path / "plain", BpeConfig(vocab_size=262, chat_template=None))
    return open_documents(tmp_path / "chats.jsonl", tokenizer, BatchConfig(sequence_length=48))


def test_conversations_are_packed_whole_and_only_answers_are_labels(conversations):
    made = batches(conversations)
    rows = [made.pieces(row) for row in range(made.rows_per_epoch)]
    assert sorted(piece.document for row in rows for piece in row) == list(range(40))
    assert all(
        piece.start == 0 and piece.count == conversations.lengths()[piece.document] for row in rows for piece in row
    )
    used = [sum(piece.count for piece in row) for row in rows]
    assert max(used) <= 48 and sum(used) > 0.9 * 48 * (len(rows) - 1)
    assert rows != [made.pieces(made.rows_per_epoch + row) for row in range(made.rows_per_epoch)]
    assert sorted(map(str, rows)) == sorted(str(made.pieces(made.rows_per_epoch + row)) for row in range(len(rows)))
    for cursor in (0, 5, made.rows_per_epoch - 1):
        micro_batches = list(made.step(cursor))
        labels = torch.cat([micro.labels for micro in micro_batches])
        assert made.targets(cursor) == int((labels != -100).sum())
        assert made.tokens(cursor) == len(labels) == sum(len(micro.packed.ids) for micro in micro_batches)
    (piece, *_), micro = rows[0], next(made.step(0))
    ids, is_learnt = (
        conversations[piece.document].astype(np.int64),
        conversations.is_learnt(piece.document, 0, piece.count),
    )
    expected = np.where(is_learnt, ids, -100)[1:].tolist()
    assert micro.labels[: piece.count].tolist() == [*expected, -100]


def test_keys_are_functions_of_the_seed_and_the_rows(shards):
    one, other = batches(shards, rows=2), batches(shards, rows=1, micro_batches=6)
    keys = [micro.key.item() for micro in one.step(4)]
    assert keys == [other.micro_batch(4, 2 * number).key.item() for number in range(3)] and len(set(keys)) == 3
    assert keys != [micro.key.item() for micro in batches(shards, seed=1).step(4)]


def test_too_little_text_is_said(shards):
    with pytest.raises(ValueError, match=r"not one row of 100,000: make batch.sequence_length smaller"):
        batches(shards, sequence_length=100_000)
