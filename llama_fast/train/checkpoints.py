"""A run's checkpoints: everything that the next step depends on, in a folder a step that is there whole or not at all.

    checkpoints/step-00000100/   .metadata, __0_0.distcp   weights and the optimizer's states, by torch.distributed.checkpoint
                                 config.json               the decoder, as Hugging Face writes it
                                 progress.json             `Progress`, and what the run is of

It is written as `step-00000100.tmp` and renamed when all of it is on the disk. There is no state of random numbers: all that is random is a
function of the seed and the step.
"""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import disk_usage
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from ..decoder.config import DecoderConfig
from ..reports.units import size
from .model import TrainedDecoder
from .optimizer import Optimizers


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: steps done, skipped ones too.
        rows: of the data that were read: the cursor.
        skipped: steps that left the weights as they were, in all; `skipped_in_a_row` just before.
        recent: losses of the last steps that were not skipped.
        best, best_step: the lowest bits per byte, and when; None before the first evaluation.
        worse_in_a_row: evaluations since then.
    """

    step: int = 0
    rows: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None
    best_step: int | None = None
    worse_in_a_row: int = 0
    recent: list[float] = field(default_factory=list)


def folders(run: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by their step, the first one first."""
    found = {}
    for folder in (run / "checkpoints").glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdecimal() and (folder / ".metadata").is_file():
            found[int(number)] = folder
    return dict(sorted(found.items()))


def save(
    run: Path, model: TrainedDecoder, optimizers: Optimizers, progress: Progress, *, data: Mapping[str, str]
) -> Path:
    """Writes the checkpoint of this step. `data` says what the run learns from: `restore` compares it.

    Raises:
        OSError: the disk is full, or cannot be written; nothing is left of the checkpoint.
    """
    folder = run / "checkpoints" / f"step-{progress.step:08d}"
    if folder.exists():
        return folder
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write(unfinished / "config.json", model.config.to_huggingface())
        _write(unfinished / "progress.json", {"progress": asdict(progress), "data": dict(data)})
        _write_tensors(unfinished, _tensors(model, optimizers))
        _sync(unfinished)
        os.replace(unfinished, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def restore(folder: Path, model: TrainedDecoder, optimizers: Optimizers, *, data: Mapping[str, str]) -> Progress:
    """Puts weights and states back where they were.

    Raises:
        ValueError: the checkpoint is of a model of another shape, of other data, or of another optimizer.
    """
    stored = decoder_config(folder)
    if stored != model.config:
        theirs, ours = stored.to_huggingface(), model.config.to_huggingface()
        differ = [
            f"{name} is {theirs.get(name)!r} there and {ours[name]!r} here"
            for name in ours
            if ours[name] != theirs.get(name)
        ]
        raise ValueError(f"{folder} is of another model: {'; '.join(differ)}. Name another run.out, or undo the change")
    note = _read(folder / "progress.json")
    for name, hashed in data.items():
        if note["data"].get(name) != hashed:
            raise ValueError(
                f"{folder} was trained on another {name}: name another run.out for a new run, or give the {name} it began with"
            )
    tensors = _tensors(model, optimizers)
    there = set(FileSystemReader(folder).read_metadata().state_dict_metadata)
    here = {f"{part}.{name}" for part, named in tensors.items() for name in named}
    if there != here:
        other = sorted(there ^ here)[0]
        raise ValueError(f"{folder} was trained with another optimizer.kind: one of the two has {other}")
    _load(folder, tensors)
    return Progress(**note["progress"])


def load_weights(folder: Path) -> TrainedDecoder:
    """The model of a checkpoint, without its optimizer."""
    model = TrainedDecoder(decoder_config(folder))
    _load(folder, {"model": model.state_dict()})
    return model


def load_learnt(folder: Path, model: TrainedDecoder) -> None:
    """Puts what a checkpoint holds into the parameters that training changes."""
    _load(folder, {"model": model.learnt()})


def remove_old(run: Path, *, keep: int, best: int | None) -> None:
    """Leaves the last `keep` checkpoints, and that of the best step."""
    for step, folder in list(folders(run).items())[:-keep]:
        if step != best:
            shutil.rmtree(folder)


def decoder_config(folder: Path) -> DecoderConfig:
    return DecoderConfig.from_huggingface(_read(folder / "config.json"))


def _tensors(model: TrainedDecoder, optimizers: Optimizers) -> dict[str, Mapping[str, Tensor]]:
    return {"model": model.learnt(), "optimizer": optimizers.states()}


def _write_tensors(folder: Path, tensors: dict[str, Mapping[str, Tensor]]) -> None:
    """What fails is told as an OSError: PyTorch's own error is no Exception, and says "unexpected pos" of a full disk."""
    needed, free = (
        sum(tensor.nbytes for named in tensors.values() for tensor in named.values()),
        disk_usage(folder).free,
    )
    if free < needed:
        raise OSError(errno.ENOSPC, f"a checkpoint takes {size(needed)}, and {size(free)} are free in {folder.parent}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            save_tensors(tensors, checkpoint_id=folder, no_dist=True)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            raise KeyboardInterrupt from None
        raise OSError(
            errno.EIO, f"the checkpoint was not written ({causes[0]}); {size(needed)} are needed in {folder.parent}: is it full?"
        ) from error  # fmt: skip


def _load(folder: Path, tensors: Mapping[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(dict(tensors), checkpoint_id=folder, no_dist=True)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """Numbers as they are: what is read back must be the same."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
