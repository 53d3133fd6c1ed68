"""Weights in huge pages: the same numbers, in other memory."""

import re
from pathlib import Path

import pytest
import torch

from llama_fast.kernels.huge_pages import prefer_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(tensor):
    """Of the mapping in which a tensor begins."""
    inside, start = False, tensor.data_ptr()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= start < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages"):
            return 1024 * int(line.split()[1])
    return 0


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this system gives no huge pages")
def test_new_memory_comes_in_huge_pages():
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.empty(2**24)
    prefer_huge_pages([x])
    x.copy_(torch.arange(2**24, dtype=torch.float32))
    assert huge_bytes(x) >= x.nbytes // 2  # the system may be short of some
    assert torch.equal(x, torch.arange(2**24, dtype=torch.float32))


def test_what_is_written_keeps_its_numbers_and_its_place():
    weight = torch.nn.Parameter(torch.randn(1500, 1000))
    given = [
        weight,
        weight[3:, 5:],
        torch.zeros(3),
        torch.empty(0),
        torch.empty(2**22, device="meta"),
        torch.eye(9).to_sparse(),
    ]
    before, place = weight.detach().clone(), weight.data_ptr()
    prefer_huge_pages(given)
    assert torch.equal(weight, before) and weight.data_ptr() == place
