"""A GGUF file that is written for llama.cpp holds the checkpoint's own numbers: our reader, which is tested by itself, reads it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.benchmarks.engines.gguf_file import why_not, write_gguf
from llama_fast.decoder import checkpoint
from llama_fast.decoder.gguf.file import open_file
from tests.decoder.gguf.test_model import make
from tests.parity import not_interpreted

pytestmark = not_interpreted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True, head_dim=32)], ids=["untied", "tied, head_dim"])
def test_what_is_written_is_read(changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(**changes, rope_parameters=dict(rope_type="default", rope_theta=5000.0)).to(dtype)
    model.save_pretrained(tmp_path / "folder")
    write_gguf(tmp_path / "folder", tmp_path / "a.gguf", dtype)
    ours, theirs = (
        checkpoint.load(place, device="cpu", dtype=dtype) for place in (tmp_path / "a.gguf", tmp_path / "folder")
    )
    for name in (
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "max_positions",
        "norm_eps",
        "rope",
        "tied_embeddings",
    ):
        assert getattr(ours.config, name) == getattr(theirs.config, name), name
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name
    kinds = {len(tensor.shape): tensor.dtype for tensor in open_file(tmp_path / "a.gguf").tensors.values()}
    assert kinds == {1: torch.float32, 2: dtype}, "llama.cpp has norms in float32"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(architecture="qwen2"), "a llama alone, and this is a qwen2"),
        (dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)), "without scaled RoPE, and this has linear"),
    ],
    ids=["qwen2", "linear"],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    make(**changes).save_pretrained(tmp_path / "folder")
    assert says in str(why_not(checkpoint.open_checkpoint(tmp_path / "folder").config))
    with pytest.raises(ValueError, match=says):
        write_gguf(tmp_path / "folder", tmp_path / "a.gguf", torch.float32)
