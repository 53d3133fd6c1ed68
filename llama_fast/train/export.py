"""A run's model as a folder that `llama_fast.LLM` and transformers load."""

import json
import os
import secrets
import shutil
from pathlib import Path

from ..data.bpe import copy_tokenizer
from ..decoder import checkpoint
from ..decoder.config import DecoderConfig
from . import checkpoints


def export(run: str | Path, folder: str | Path, *, step: int | None = None) -> Path:
    """Writes the weights of a checkpoint (None: the last) with config, tokenizer and generation config to `folder`.

    Returns:
        The checkpoint that was taken.

    Raises:
        ValueError: there is no such checkpoint; `folder` is there and not empty.
        OSError: it cannot be written.
    """
    run, folder = Path(run), Path(folder)
    there = checkpoints.folders(run)
    if not there:
        raise ValueError(f"{run} has no checkpoint: give the folder of a run (run.out)")
    step = max(there) if step is None else step
    if step not in there:
        raise ValueError(f"{run} has no checkpoint of step {step}; there are {', '.join(map(str, there))}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: choose another, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    decoder = checkpoints.load_weights(there[step]).as_decoder()
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        checkpoint.save(decoder, unfinished)
        _add_tokenizer(run / "tokenizer", unfinished)
        _add_generation_config(unfinished, decoder.config)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return there[step]


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
