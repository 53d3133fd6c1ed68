"""What dropout leaves out is a function of its key and its place."""

import torch

from llama_fast.train.dropout import Dropout, make_key, name_sites
from llama_fast.train.model import Packed
from tests.parity import not_interpreted
from tests.train.test_model import LENGTHS, tokens, trained

pytestmark = not_interpreted


def test_a_share_is_left_out_and_the_rest_is_larger():
    dropout, x = Dropout(0.25), torch.randn(200, 100, requires_grad=True)
    y = dropout(x, make_key(1, 2))
    kept = y != 0
    assert 0.24 < 1 - kept.float().mean() < 0.26
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, kept / 0.75)
    assert dropout(x, None) is x and Dropout(0.0)(x, make_key(1, 2)) is x


def test_it_depends_on_key_and_site_alone():
    x = torch.ones(64, 64)
    model = torch.nn.ModuleDict(dict(a=Dropout(0.5), b=Dropout(0.5)))
    name_sites(model)
    found = [
        model[site](x, make_key(seed, number))
        for site, seed, number in (("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1))
    ]
    assert all((one != other).float().mean() > 0.4 for i, one in enumerate(found) for other in found[:i])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.manual_seed(5)
        assert torch.equal(model["a"](x, make_key(0, 0)), found[0])
    finally:
        torch.set_num_threads(threads)


def test_a_model_repeats_itself_also_where_it_computes_again():
    """Each layer's two and the embedding's; with another key another loss, without one that of a model without dropout."""
    ids, found = tokens(64), []
    for recompute in ("none", "full", "selective"):
        model = trained(recompute=recompute, dropout=0.1)
        loss = model(Packed.of(ids, LENGTHS), ids, key=make_key(0, 0))
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))
    assert not torch.equal(model(Packed.of(ids, LENGTHS), ids, key=make_key(0, 1)), found[0][0])
    assert torch.equal(model(Packed.of(ids, LENGTHS), ids), trained()(Packed.of(ids, LENGTHS), ids))
