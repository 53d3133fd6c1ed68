"""Random kernels (`fuzz.py`): compiled for this CPU, they do what their source means."""

import importlib.util

import pytest
import torch

from llama_fast import native

from .fuzz import Writer, reference

pytestmark = pytest.mark.skipif(
    native.why_not_native() is not None, reason=f"no native kernels: {native.why_not_native()}"
)


def check(seed: int, directory) -> None:
    source, inputs = Writer(seed).kernel()
    file = directory / f"fuzz_{seed}.py"
    file.write_text("import triton\nimport triton.language as tl\n\n\n" + source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = reference(source, inputs)
    memory = [tensor.clone() for tensor in inputs[:3]]
    try:
        native.launch(getattr(module, f"kernel_{seed}"), (1,), *memory, inputs[3])
    except Exception as error:
        raise AssertionError(f"seed {seed}, n = {inputs[3]}:\n{source}") from error
    for name, got, wanted in zip("fgh", memory, expected, strict=True):
        places = (got != wanted).nonzero().flatten()[:8].tolist()
        assert torch.equal(got, wanted), f"seed {seed}, n = {inputs[3]}, {name}{places}:\n{source}"


@pytest.mark.parametrize("seed", [*range(100), 1935, 7148])
def test_random_kernels(seed, tmp_path):
    check(seed, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("block", range(40))
def test_many_random_kernels(block, tmp_path):
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        check(seed, tmp_path)
