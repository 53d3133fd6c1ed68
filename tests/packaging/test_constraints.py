"""The constraints that `make` installs by: everything is pinned, and what is pinned is what these tests run with."""

import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.parity import not_interpreted

pytestmark = not_interpreted

ROOT = Path(__file__).parents[2]


def pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): pinned for name, _, pinned in (line.partition("==") for line in lines)}


def needed() -> set[str]:
    """All that `llama-fast[dev]` needs here, and what those need."""
    found: set[tuple[str, str]] = set()
    ahead = [("llama-fast", "dev"), ("setuptools", "")]
    while ahead:
        name, extra = ahead.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for requirement in map(Requirement, requires(name) or []):
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": each}) for each in {extra, ""}):
                needs = canonicalize_name(requirement.name)
                ahead += [(needs, each) for each in {"", *requirement.extras}]
    return {name for name, _ in found} - {"llama-fast"}


def test_all_that_is_needed_is_pinned_to_what_is_here():
    try:
        here = {name: version(name).partition("+")[0] for name in needed()}
    except PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: not all of llama-fast[dev] is here")
    pinned = pins("constraints.txt")
    if here["torch"] != pinned["torch"]:
        pytest.skip(f"torch is {here['torch']}, and constraints.txt is for {pinned['torch']}")
    assert {name: pinned.get(name, "not pinned") for name in here} == here


def test_a_pin_is_a_release_that_everybody_can_have():
    assert all(pinned and "+" not in pinned for pinned in pins("constraints.txt").values())


def test_another_torch_brings_its_own():
    left_out = {"torch", "triton", "setuptools", "sympy"}
    everything = pins("constraints.txt")
    assert pins("constraints-any-torch.txt") == {name: everything[name] for name in everything.keys() - left_out}


@pytest.mark.parametrize(("file", "holds"), [("llama_cpp", "llama-cpp-python"), ("openvino", "openvino-genai")])
def test_so_are_those_of_the_engines_that_are_measured_beside_ours(file, holds):
    pinned = pins(f"benchmarks/engines/{file}.txt")
    assert holds in pinned and all(re.fullmatch(r"[\w.]+", version) for version in pinned.values())
