"""Rows of an embedding: parity, strides, edges, errors, and what PyTorch asks of an op."""

import pytest
import torch
import torch.nn.functional as F

from llama_fast.kernels.embedding import embedding, embedding_op
from tests.parity import DTYPES, not_interpreted, on_cpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(1, 1, 1), (0, 3, 5), (3, 50, 64), (17, 7, 4099)])
def test_embedding_gives_the_rows(rows, vocab, hidden, dtype, device):
    weight = torch.randn(vocab, hidden, device=device, dtype=dtype)
    index = torch.randint(0, vocab, (rows,), device=device)
    with torch.no_grad():
        assert torch.equal(embedding(index, weight), F.embedding(index, weight))
        assert torch.equal(embedding(index, weight.T.contiguous().T), F.embedding(index, weight))


@on_cpu
@pytest.mark.parametrize("wrong", [-1, 5])
def test_embedding_of_a_row_that_is_not_there(wrong):
    with pytest.raises(IndexError, match=f"index must be from 0 to 4, the rows of weight, got {wrong}"):
        embedding(torch.tensor([0, wrong]), torch.zeros(5, 4))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(1, 1, 1), (0, 3, 5), (30, 7, 65), (40, 5000, 1030)])
def test_its_gradient_has_the_bits_of_pytorchs_rounded_once(rows, vocab, hidden, dtype):
    index, dy = torch.randint(0, vocab, (rows,)), torch.randn(rows, hidden, dtype=dtype)
    weight = torch.randn(vocab, hidden, dtype=dtype, requires_grad=True)
    embedding(index, weight).backward(dy)
    wide = torch.promote_types(dtype, torch.float32)
    wide_weight = weight.detach().to(wide).requires_grad_()
    F.embedding(index, wide_weight).backward(dy.to(wide))
    assert torch.equal(weight.grad, wide_weight.grad.to(dtype))


@not_interpreted
def test_opcheck(device):
    weight = torch.randn(3, 8, device=device)
    for each in (weight, weight.requires_grad_()):
        torch.library.opcheck(embedding_op, (torch.tensor([0, 2], device=device), each))
