"""A run's checkpoints: everything that the next step depends on, in a folder a step that is there whole or not at all.

    checkpoints/step-00000100/   .metadata, __0_0.distcp   weights and the optimizer's states, by torch.distributed.checkpoint: a file of
                                                           each rank, which any number of ranks can read
                                 config.json               the decoder, as Hugging Face writes it
                                 progress.json             `Progress`, what the run is of, and on which ranks

It is written as `step-00000100.tmp`, beside the steps that follow, and renamed when all of it is on the disk. There is no state of random
numbers: all that is random is a function of the seed and the step.
"""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from shutil import disk_usage
from threading import Thread
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from ..decoder.config import DecoderConfig
from ..reports.units import size
from .model import TrainedDecoder
from .optimizer import Optimizers
from .ranks import ALONE, Layout, Ranks

Tensors = Mapping[str, Mapping[str, Tensor]]
"""By "model" or "optimizer", and their names there."""


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
        if number.isdecimal() and _is_complete(folder):
            found[int(number)] = folder
    return dict(sorted(found.items()))


class Saver:
    """Writes a run's checkpoints, one at a time, while the run goes on; removes what a run that was killed has left of one.

    The thread is a daemon, as that of PyTorch's `async_save` is not: who leaves at once does not wait for it.

    Attributes:
        step: of the last checkpoint that was begun.
    """

    def __init__(self, run: Path, ranks: Ranks) -> None:
        self._folder, self._ranks = run / "checkpoints", ranks
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self.step = 0
        if ranks.is_first:
            for unfinished in self._folder.glob("step-*.tmp"):
                shutil.rmtree(unfinished)

    def start(
        self, model: TrainedDecoder, optimizers: Optimizers, progress: Progress, note: Mapping[str, Any], *, keep: int
    ) -> None:
        """Copies weights and states, and begins to write them; nothing if this step's checkpoint is there. Call `finish` before.

        Args:
            note: what `restore` compares and returns, by name.
            keep: the last so many checkpoints, and the best one, are left.

        Raises:
            OSError: on all ranks; the disk is full, or cannot be written. Nothing is left of the checkpoint.
        """
        self.step = progress.step
        folder = self._folder / f"step-{progress.step:08d}"
        tensors = _tensors(model, optimizers)
        is_there, problem = self._ranks.of_the_first(
            (_is_complete(folder), None if _is_complete(folder) else _prepared(folder, model, tensors, progress, note))
            if self._ranks.is_first
            else (False, None)
        )
        if problem is not None:
            raise problem
        if not is_there:
            copies = {part: {name: _copied(each) for name, each in named.items()} for part, named in tensors.items()}
            self._thread = Thread(target=self._write, args=(folder, copies, keep, progress.best_step), daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Raises what went wrong with the checkpoint that is being written, as soon as that is known: OSError, on some ranks or all."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Waits until it is written. Raises as `check` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _write(self, folder: Path, tensors: Tensors, keep: int, best: int | None) -> None:
        unfinished = _unfinished(folder)
        try:
            _write_tensors(unfinished, tensors, self._ranks)
            if self._ranks.is_first:
                _sync(unfinished)
                os.replace(unfinished, folder)
                _sync(folder.parent)
                remove_old(folder.parent.parent, keep=keep, best=best)
        except BaseException as error:
            self._error = error
            if self._ranks.is_first:
                shutil.rmtree(unfinished, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    return (folder / ".metadata").is_file()


def _unfinished(folder: Path) -> Path:
    return folder.with_name(folder.name + ".tmp")


def _prepared(
    folder: Path, model: TrainedDecoder, tensors: Tensors, progress: Progress, note: Mapping[str, Any]
) -> OSError | None:
    """Makes the folder that is to be renamed, with all but the tensors in it. Returns why that, or the rest, cannot be."""
    unfinished = _unfinished(folder)
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        needed, free = _size(tensors), disk_usage(unfinished).free
        if free < needed:
            raise OSError(
                errno.ENOSPC, f"a checkpoint takes {size(needed)}, and {size(free)} are free in {folder.parent}"
            )
        _write(unfinished / "config.json", model.config.to_huggingface())
        _write(unfinished / "progress.json", {"progress": asdict(progress), **note})
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            return error
        raise
    return None


def restore(
    folder: Path, model: TrainedDecoder, optimizers: Optimizers, ranks: Ranks, *, origin: Mapping[str, str | None]
) -> tuple[Progress, Layout]:
    """Puts weights and states back where they were, whichever ranks have written them.

    Args:
        origin: as `check_origin` has it.

    Returns:
        Where the run stood, and on which ranks.

    Raises:
        ValueError: the checkpoint is of a model of another shape, of another origin, or of another optimizer, or it is damaged.
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
    check_origin(folder, origin)
    tensors = _tensors(model, optimizers)
    _check_tensors(folder, tensors)
    _load(folder, tensors, ranks)
    _, progress, layout = _note(folder)
    return progress, layout


def check_origin(folder: Path, origin: Mapping[str, str | None]) -> None:
    """Compares what a run is of, by name, with what its checkpoint was of. What an older version has not written is not compared.

    Raises:
        ValueError: something is another.
    """
    there, _, _ = _note(folder)
    for name, value in origin.items():
        if there.get(name, value) != value:
            raise ValueError(
                f"{folder} was trained with another {name}: name another run.out for a new run, or give the {name} it began with"
            )


def _check_tensors(folder: Path, tensors: Tensors) -> None:
    there = _metadata(folder).state_dict_metadata
    here = {f"{part}.{name}": tensor for part, named in tensors.items() for name, tensor in named.items()}
    undo = "Name another run.out, or undo the change of optimizer.kind, lora or run.weights"
    if differ := there.keys() ^ here.keys():
        raise ValueError(f"{folder} holds other tensors: one of the two has {min(differ)}. {undo}")
    for name, tensor in here.items():
        stored = there[name]
        assert isinstance(stored, TensorStorageMetadata)
        theirs, ours = f"{tuple(stored.size)} {stored.properties.dtype}", f"{tuple(tensor.shape)} {tensor.dtype}"
        if theirs != ours:
            raise ValueError(f"{folder} holds other tensors: {name} is {theirs} there and {ours} here. {undo}")


def load_weights(folder: Path) -> TrainedDecoder:
    """The model of a checkpoint, without its optimizer."""
    model = TrainedDecoder(decoder_config(folder))
    _load(folder, {"model": model.state_dict()}, ALONE)
    return model


def load_learnt(folder: Path, model: TrainedDecoder) -> None:
    """Puts what a checkpoint holds into the parameters that training changes."""
    _load(folder, {"model": model.learnt()}, ALONE)


def remove_old(run: Path, *, keep: int, best: int | None) -> None:
    """Leaves the last `keep` checkpoints, and that of the best step. One of which only a part is gone is none."""
    for step, folder in list(folders(run).items())[:-keep]:
        if step != best:
            os.replace(folder, _unfinished(folder))
            shutil.rmtree(_unfinished(folder), ignore_errors=True)


def decoder_config(folder: Path) -> DecoderConfig:
    return DecoderConfig.from_huggingface(_read(folder / "config.json"))


def _tensors(model: TrainedDecoder, optimizers: Optimizers) -> Tensors:
    return {"model": model.learnt(), "optimizer": optimizers.states()}


def _size(tensors: Tensors) -> int:
    """Bytes, of all ranks together."""
    return sum(tensor.nbytes for named in tensors.values() for tensor in named.values())


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _write_tensors(folder: Path, tensors: Tensors, ranks: Ranks) -> None:
    """What fails is told as an OSError: PyTorch's own error is no Exception, and says "unexpected pos" of a full disk."""
    try:
        with _quiet():
            save_tensors(dict(tensors), checkpoint_id=folder, process_group=ranks.group, no_dist=ranks.group is None)
    except CheckpointException as error:
        cause = next(cause for cause, _ in error.failures.values())
        raise OSError(
            errno.EIO, f"the checkpoint was not written ({cause}); {size(_size(tensors))} are needed in {folder.parent}: is it full?"
        ) from error  # fmt: skip


def _load(folder: Path, tensors: Tensors, ranks: Ranks) -> None:
    try:
        with _quiet():
            load(dict(tensors), checkpoint_id=folder, process_group=ranks.group, no_dist=ranks.group is None)
    except CheckpointException as error:
        raise _damaged(folder, next(cause for cause, _ in error.failures.values())) from None


def _metadata(folder: Path) -> Metadata:
    try:
        return FileSystemReader(folder).read_metadata()
    except (EOFError, UnpicklingError) as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, cause: object) -> ValueError:
    return ValueError(f"{folder} is damaged ({cause}): remove it, and the run goes on from the checkpoint before it")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warning that a process which is alone saves alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """Numbers as they are: what is read back must be the same."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise _damaged(path.parent, f"{path.name}: {error}") from None
    return value


def _note(folder: Path) -> tuple[dict[str, str], Progress, Layout]:
    """What the run was of, where it stood, and on which ranks."""
    note = _read(folder / "progress.json")
    try:
        return note["data"], Progress(**note["progress"]), Layout(**note["layout"])
    except (KeyError, TypeError) as error:
        raise _damaged(folder, f"progress.json: {error!r}") from None


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
