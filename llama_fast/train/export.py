"""A run's model as a folder that `llama_fast.LLM` and transformers load, or its adapter as one that PEFT loads."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data.bpe import copy_tokenizer
from ..decoder import checkpoint
from ..decoder.config import DecoderConfig
from . import checkpoints, lora
from .start import model_of


def export(run: str | Path, folder: str | Path, *, step: int | None = None, adapter: bool = False) -> Path:
    """Writes the weights of a checkpoint (None: the last) with config, tokenizer and generation config to `folder`.

    Adapters are merged into the weights they stand beside; with `adapter` they alone are written, as PEFT does.

    Returns:
        The checkpoint that was taken.

    Raises:
        ValueError: there is no such checkpoint; `folder` is there and not empty; the run has no adapter.
        OSError: it cannot be written.
    """
    run, folder = Path(run), Path(folder)
    taken = checkpoint_of(run, step)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: choose another, or remove it")
    model, config = model_of(run, taken)
    if adapter:
        if config.lora is None:
            raise ValueError(f"{run} has no adapter: it was trained without [lora]")
        assert config.model.path is not None
        with _whole(folder) as unfinished:
            unfinished.mkdir()
            lora.save(model, config.lora, unfinished, base=config.model.path)
            _add_tokenizer(run / "tokenizer", unfinished)
        return taken
    lora.merge(model)
    decoder = model.as_decoder()
    with _whole(folder) as unfinished:
        checkpoint.save(decoder, unfinished)
        _add_tokenizer(run / "tokenizer", unfinished)
        _add_generation_config(unfinished, decoder.config)
    return taken


def checkpoint_of(run: Path, step: int | None) -> Path:
    """The checkpoint of a step, None: the last. Raises ValueError if there is none."""
    there = checkpoints.folders(run)
    if not there:
        raise ValueError(f"{run} has no checkpoint: give the folder of a run (run.out)")
    step = max(there) if step is None else step
    if step not in there:
        raise ValueError(f"{run} has no checkpoint of step {step}; there are {', '.join(map(str, there))}")
    return there[step]


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside it, which takes its place at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        yield unfinished
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _add_tokenizer(source: Path, folder: Path) -> None:
    copied = folder / "tokenizer"
    copy_tokenizer(source, copied)
    for file in copied.iterdir():
        file.rename(folder / file.name)
    copied.rmdir()


def _add_generation_config(folder: Path, config: DecoderConfig) -> None:
    path = folder / "generation_config.json"
    if not path.exists():
        named = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
        path.write_text(json.dumps({name: ids for name, ids in named.items() if ids not in (None, [])}, indent=2))
