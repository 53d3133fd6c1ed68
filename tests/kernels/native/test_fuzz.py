"""Random kernels (`fuzz_grammar.py`): compiled for this CPU, they do what their source means (`fuzz_meaning.py`)."""

import importlib.util
import inspect

import pytest

from llama_fast import native

from . import fuzz_meaning
from .fuzz_grammar import PIECES, Writer

pytestmark = pytest.mark.skipif(
    native.why_not_native() is not None, reason=f"no native kernels: {native.why_not_native()}"
)


def difference(file) -> str:
    """Where memory is not what it must be after the kernel of a file has run; "" if there is no such place."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (name,) = [name for name in vars(module) if name.startswith("kernel_")]
    kernel, arguments, expected = getattr(module, name), module.memory(), module.memory()
    fuzz_meaning.run(inspect.getsource(kernel.fn), name, expected)
    native.launch(kernel, (1,), *arguments)
    for piece, got, wanted in zip(PIECES, arguments, expected, strict=False):
        places = (got != wanted).nonzero().flatten()[:8].tolist()
        if places:
            return f"{piece}{places} is {got[places].tolist()}, must be {wanted[places].tolist()}"
    return ""


def check(seed: int, directory) -> None:
    file = directory / f"fuzz_{seed}.py"
    file.write_text(Writer(seed).program())
    try:
        wrong = difference(file)
    except Exception as error:
        raise AssertionError(f"seed {seed}:\n{file.read_text()}") from error
    assert not wrong, f"{wrong}\n{file.read_text()}"


@pytest.mark.parametrize("seed", [*range(80), 1255, 2154])
def test_random_kernels(seed, tmp_path):
    check(seed, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("block", range(20))
def test_many_random_kernels(block, tmp_path):
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        check(seed, tmp_path)
