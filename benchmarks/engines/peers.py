"""Who is measured beside whom: engines, and the files that each has the same model from."""

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_fast.benchmarks.engines.gguf_file import why_not, write_gguf
from llama_fast.benchmarks.engines.process import Program, ours, peer
from llama_fast.benchmarks.models import StoredModel, build_model
from llama_fast.benchmarks.peers import OURS
from llama_fast.benchmarks.shapes import ModelShape
from llama_fast.decoder import checkpoint
from llama_fast.decoder.config import DecoderConfig
from llama_fast.decoder.gguf.file import is_gguf
from llama_fast.decoder.gguf.tokenizer import read_tokenizer
from llama_fast.decoder.tokenizer import TOKENIZER_FILE, has_tokenizer
from llama_fast.engine.llm import EMBEDDED_MODEL
from llama_fast.profiler.measure.sides import without_bars

LLAMA_CPP, OPENVINO = "llama.cpp", "OpenVINO GenAI"


@dataclass(frozen=True)
class Peer:
    """An engine, and its model, made of a folder of transformers' in a dtype."""

    program: Program
    model: Callable[[Path, torch.dtype], Path]
    why_not: Callable[[DecoderConfig], str | None] = lambda _: None


def _itself(folder: Path, dtype: torch.dtype) -> Path:
    return folder


def _gguf(folder: Path, dtype: torch.dtype) -> Path:
    file = folder.with_suffix(".gguf")
    if not file.exists():
        write_gguf(folder, file, dtype)
    return file


def _openvino(folder: Path, dtype: torch.dtype) -> Path:
    exported = folder.with_suffix(".openvino")
    if not exported.exists():
        program = peer("openvino")
        script = program.file.with_name("openvino_export.py")
        name = str(dtype).removeprefix("torch.")
        done = subprocess.run([program.python, script, folder, exported, name], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"it cannot be exported: {done.stderr.strip().splitlines()[-1]}")
    return exported


def engines() -> dict[str, Peer]:
    """Who takes part, by name."""
    return {
        OURS: Peer(ours(), _itself),
        LLAMA_CPP: Peer(peer("llama_cpp"), _gguf, why_not),
        OPENVINO: Peer(peer("openvino"), _openvino),
    }


def load_saved(stored: ModelShape | StoredModel, dtype: torch.dtype, folder: Path) -> Any:
    """transformers' model as it lies in `folder`, where it is saved first; our reader dequantises a stored one."""
    from transformers import AutoModelForCausalLM

    with without_bars():
        if not folder.exists():
            if isinstance(stored, StoredModel):
                checkpoint.save(checkpoint.load(stored.path, device="cpu", dtype=dtype), folder)
            else:
                build_model(stored, torch.device("cpu"), dtype).save_pretrained(folder)
            _add_tokenizer(stored, folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def _add_tokenizer(model: ModelShape | StoredModel, folder: Path) -> None:
    """So that llama-fast makes the text too, as it does for its users; that of random weights by the embedded model's tokens."""
    source = model.path if isinstance(model, StoredModel) else EMBEDDED_MODEL
    if is_gguf(source):
        read_tokenizer(source).backend.save(str(folder / TOKENIZER_FILE))
    elif has_tokenizer(source):
        shutil.copy(source / TOKENIZER_FILE, folder)


@functools.lru_cache(maxsize=1)  # the sessions of a model and dtype come one after the other
def _temporary(model: ModelShape | StoredModel, dtype: torch.dtype) -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="llama-fast-engines-")


def folder_of(model: ModelShape | StoredModel, dtype: torch.dtype) -> Path:
    """Where the model lies as transformers saves it; what others make of it lies beside it."""
    return Path(_temporary(model, dtype).name) / "model"
