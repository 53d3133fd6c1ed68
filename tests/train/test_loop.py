"""Runs: they go on where they were interrupted, to the same bits, and nothing that goes wrong spoils what was learnt."""

import csv
import errno
import json
import os
import resource
import shutil
import signal
import threading
import time
import warnings
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from llama_fast.config_file import read_config
from llama_fast.train import checkpoints
from llama_fast.train.config import TrainConfig
from llama_fast.train.loop import Diverged, train
from llama_fast.train.metrics import Journal
from llama_fast.train.model import TrainedDecoder
from llama_fast.train.start import first_model, tokenizer_of
from tests.parity import not_interpreted
from tests.train.conftest import longer

pytestmark = not_interpreted


def rows(config):
    with (config.run.out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def numbers(config):
    """What of metrics.csv is no time."""
    names = ("step", "loss", "gradient_norm", "learning_rate", "skipped", "bits_per_byte")
    return [[row[name] for name in names] for row in rows(config)]


def weights(config, step=None):
    there = checkpoints.folders(config.run.out)
    return checkpoints.load_weights(there[step or max(there)]).state_dict()


def moments(config, step):
    """Everything in a checkpoint, also the optimizer's states."""
    folder = checkpoints.folders(config.run.out)[step]
    found = {
        name: torch.empty(each.size)
        for name, each in FileSystemReader(folder).read_metadata().state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is distributed
        load(found, checkpoint_id=folder, no_dist=True)
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def quiet(line):
    pass


class Nan:
    """Makes the loss of some calls of the model NaN, counted from 0."""

    def __init__(self, monkeypatch, calls):
        self.calls, self.seen = calls, -1
        forward = TrainedDecoder.forward

        def spoiled(model, *arguments, **options):
            self.seen += torch.is_grad_enabled()
            loss = forward(model, *arguments, **options)
            return loss * float("nan") if torch.is_grad_enabled() and self.seen in self.calls else loss

        monkeypatch.setattr(TrainedDecoder, "forward", spoiled)


@pytest.mark.parametrize(
    "settings",
    [(), ("run.dtype=bfloat16", "optimizer.kind=muon", "run.recompute=selective", "batch.micro_batches=3")],
    ids=["float32 AdamW", "bfloat16 Muon"],
)
def test_an_interrupted_run_ends_with_the_same_bits(config, settings):
    whole = config(*settings, out="whole")
    outcome = train(whole, show=quiet)
    assert outcome.interrupted is None and outcome.progress.step == 6
    assert outcome.progress.rows == 6 * whole.batch.rows_per_step
    parts = config(*settings, out="parts")

    def stop_after_four(line):
        if line.startswith("step 4/"):
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = train(parts, show=stop_after_four)
    assert (stopped.interrupted, stopped.progress.step) == (signal.SIGTERM, 4)
    with (parts.run.out / "metrics.csv").open("a") as file:
        file.write("5,0,0,0,False,384,0,0,,,\n")  # of a step that no checkpoint knows
    assert [row["step"] for row in rows(parts)][-1] == "5"
    said = []
    ended = train(parts, show=said.append)
    assert "goes on after step 4" in said
    assert ended.progress == outcome.progress
    assert numbers(parts) == numbers(whole)
    assert same(weights(parts), weights(whole))
    assert train(parts, show=quiet).progress == outcome.progress  # there is nothing left to do


def test_a_model_has_no_weights_before_ranks_have_shared_it_out(config):
    made = config("run.weights=bfloat16", "run.dtype=bfloat16")
    model = first_model(made, tokenizer_of(made))
    assert {(each.device.type, each.dtype) for each in model.parameters()} == {("meta", torch.bfloat16)}


def test_the_same_config_is_saved_and_can_be_read(config, tmp_path):
    made = config("schedule.steps=1", "optimizer.groups=[]")
    train(made, show=quiet)
    assert read_config(made.run.out / "config.toml", TrainConfig) == made


def test_accumulation_changes_nothing_but_roundings(config):
    """One micro-batch of 8 rows against 8 of one: they have different numbers of labels."""
    one = config("batch.rows=8", "batch.micro_batches=1", "schedule.steps=3", out="one")
    eight = config("batch.rows=1", "batch.micro_batches=8", "schedule.steps=3", out="eight")
    for each in (one, eight):
        train(each, show=quiet)
    for ours, theirs in zip(rows(one), rows(eight), strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-6)
        assert float(ours["gradient_norm"]) == pytest.approx(float(theirs["gradient_norm"]), rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_not_finite_is_skipped(config, monkeypatch, fused):
    """By who calls the optimizer, or as on a GPU by fused AdamW."""
    monkeypatch.setattr("llama_fast.train.optimizer.FUSED_ON", ("cpu",) * fused)
    Nan(monkeypatch, {5, 9})  # of micro-batches, 4 a step: the second and the third one
    made = config("run.save_every=1", "run.keep=9", "schedule.steps=4")
    said = []
    progress = train(made, show=said.append).progress
    assert (progress.step, progress.skipped, progress.skipped_in_a_row) == (4, 2, 0)
    assert "step 2: skipped: the loss or the gradient is not finite" in said
    assert [row["skipped"] for row in rows(made)] == ["False", "True", "True", "False"]
    after = [moments(made, step) for step in (1, 2, 3, 4)]
    assert same(after[0], after[1]) and same(after[0], after[2]) and not same(after[0], after[3])


def test_a_spike_is_skipped_also_after_a_resume(config, monkeypatch):
    """The third step's loss is ten times as large; what it is compared with is in the checkpoint."""
    monkeypatch.setattr("llama_fast.train.loop.RECENT", 2)
    forward, calls = TrainedDecoder.forward, []

    def spiking(model, *arguments, **options):
        calls.append(torch.is_grad_enabled())
        return forward(model, *arguments, **options) * (10.0 if 8 < sum(calls) <= 12 else 1.0)

    monkeypatch.setattr(TrainedDecoder, "forward", spiking)
    made, said = config("run.spike_factor=2", "schedule.steps=2", "run.evaluate_every=0"), []
    train(made, show=said.append)
    progress = train(longer(made, 4), show=said.append).progress
    assert (progress.skipped, [row["skipped"] for row in rows(made)][2]) == (1, "True")
    (line,) = (line for line in said if "skipped:" in line)
    assert line.startswith("step 3: skipped: the loss of 49.5") and line.endswith("the median of 2 steps")


def test_ten_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(config, monkeypatch):
    Nan(monkeypatch, set(range(8, 100)))
    made = config("schedule.steps=30", "run.save_every=2", "run.evaluate_every=0")
    with pytest.raises(Diverged, match=r"10 steps in a row were skipped, up to step 12.* is good: go on from it"):
        train(made, show=quiet)
    assert all(torch.isfinite(weight).all() for weight in weights(made).values())


def test_where_no_step_was_good_no_checkpoint_is_praised(config, monkeypatch):
    Nan(monkeypatch, set(range(100)))
    with pytest.raises(Diverged, match=r"up to step 10: .* not finite\. Begin anew with a lower learning rate"):
        train(config("schedule.steps=30", "run.save_every=0", "run.evaluate_every=0"), show=quiet)


def test_the_best_checkpoint_and_the_last_ones_are_kept(config, monkeypatch):
    found = iter([float("nan"), 4.0, 4.5, 4.2, 4.1, 4.3])
    monkeypatch.setattr("llama_fast.train.loop.Validation.bits_per_byte", lambda *_: next(found))
    made = config("schedule.steps=20", "run.evaluate_every=1", "run.save_every=1", "run.patience=4", "run.keep=1")
    progress = train(made, show=quiet).progress
    assert (progress.step, progress.best, progress.best_step) == (6, 4.0, 2)  # four that are not better, and it ends
    assert list(checkpoints.folders(made.run.out)) == [2, 6]
    assert train(made, show=quiet).progress.step == 6


def test_a_checkpoint_that_cannot_be_written_is_tried_again(config, monkeypatch):
    """The first one meets a disk that takes no file of more than 100 kB."""
    made, said = config("run.evaluate_every=0"), []
    write, limits = checkpoints.save_tensors, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*arguments, **options):
        monkeypatch.setattr(checkpoints, "save_tensors", write)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            write(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoints, "save_tensors", full)
    assert train(made, show=said.append).progress.step == 6
    (line,) = (line for line in said if "no checkpoint" in line)
    assert (
        line.startswith("no checkpoint of step 2: ")
        and "1.02 MB are needed in " in line
        and line.endswith("is it full?")
    )
    assert sorted(path.name for path in (made.run.out / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


def test_a_full_disk_is_foreseen(config, monkeypatch):
    made = config("schedule.steps=2", "run.evaluate_every=0")
    monkeypatch.setattr(checkpoints, "disk_usage", lambda path: shutil.disk_usage(path)._replace(free=1000))
    with pytest.raises(OSError, match=r"a checkpoint takes 1.02 MB, and 1.00 kB are free"):
        train(made, show=quiet)
    assert list((made.run.out / "checkpoints").iterdir()) == []


def test_a_second_interrupt_does_not_wait_for_the_checkpoint(config, monkeypatch):
    """Both come while the first checkpoint is written, which takes for ever."""
    written = threading.Event()

    def slow(*arguments, **options):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # two at once would be one
        written.wait()
        raise OSError("too late")

    monkeypatch.setattr(checkpoints, "save_tensors", slow)
    made = config("run.evaluate_every=0", "schedule.steps=20")
    with pytest.raises(KeyboardInterrupt):
        train(made, show=quiet)
    assert [path.name for path in (made.run.out / "checkpoints").iterdir()] == ["step-00000002.tmp"]
    written.set()


@pytest.mark.parametrize("part", [".metadata", "__0_0.distcp", "progress.json", "config.json"])
def test_a_damaged_checkpoint_is_named(config, part):
    made = config("schedule.steps=2", "run.save_every=1", "run.evaluate_every=0")
    train(made, show=quiet)
    file = made.run.out / "checkpoints" / "step-00000002" / part
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"step-00000002 is damaged .*: remove it, and the run goes on"):
        train(longer(made, 3), show=quiet)
    shutil.rmtree(file.parent)
    assert train(made, show=quiet).progress.step == 2


def test_an_unfinished_checkpoint_is_none(config):
    made = config("schedule.steps=2", "run.evaluate_every=0")
    train(made, show=quiet)
    there = made.run.out / "checkpoints"
    (there / "step-00000002").rename(there / "step-00000003.tmp")
    (there / "step-00000002").mkdir()
    assert checkpoints.folders(made.run.out) == {}
    assert train(made, show=quiet).progress.step == 2
    assert not (there / "step-00000003.tmp").exists()
    assert list(checkpoints.folders(made.run.out)) == [2]


def test_a_checkpoint_that_is_half_removed_is_none(config, monkeypatch):
    """The process ends while one that is no longer kept is removed."""
    made = config("run.evaluate_every=0", "run.save_every=1", "run.keep=1", "schedule.steps=2")
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda folder, ignore_errors=False: None)
    train(made, show=quiet)
    assert list(checkpoints.folders(made.run.out)) == [2]
    monkeypatch.undo()
    train(made, show=quiet)
    assert [path.name for path in (made.run.out / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_disk_that_is_full_for_a_while_costs_no_line(config, monkeypatch):
    append, tries = Journal.append, []

    def failing(journal, metrics):
        tries.append(metrics)
        if len(tries) > 1:
            return append(journal, metrics)
        with monkeypatch.context() as full:
            full.setattr("pathlib.Path.open", _refused)
            return append(journal, metrics)

    monkeypatch.setattr(Journal, "append", failing)
    made, said = config("run.evaluate_every=0"), []
    assert train(made, show=said.append).progress.step == 6
    assert any(line.startswith("no metrics of step 1: [Errno 28]") for line in said)
    assert [row["step"] for row in rows(made)] == list("123456")


def _refused(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.hidden_size=32"], "is of another model: hidden_size is 64 there and 32 here"),
        (["optimizer.kind=muon"], "holds other tensors: one of the two has .* undo the change of optimizer.kind"),
        (
            ["run.weights=bfloat16", "run.dtype=bfloat16"],
            r"is \(272, 64\) torch.float32 there and \(272, 64\) torch.bfloat16 here",
        ),
        (["run.seed=1"], "was trained with another run.seed: name another run.out"),
        (["batch.sequence_length=32"], "is of another model: max_position_embeddings is 48 there and 32 here"),
    ],
)
def test_a_run_of_something_else_is_refused(config, settings, message):
    train(config("schedule.steps=1"), show=quiet)
    with pytest.raises(ValueError, match=message):
        train(config(*settings), show=quiet)


def test_other_training_text_is_refused(config, corpus):
    made = config("schedule.steps=1")
    train(made, show=quiet)
    other = replace(longer(made, 2), data=replace(made.data, train=corpus / "validation"))
    with pytest.raises(ValueError, match=r"was trained with another data\.train"):
        train(other, show=quiet)


def test_other_conversations_of_the_same_lengths_are_refused(config, tmp_path):
    def write(answer):
        file = tmp_path / "chats.jsonl"
        file.write_text(
            json.dumps(dict(prompt="How?", response="So.")) + "\n" + json.dumps(dict(prompt="What?", response=answer))
        )
        return config(f"data.train={file}", "schedule.steps=1", "run.evaluate_every=0")

    train(write("abc"), show=quiet)
    with pytest.raises(ValueError, match=r"was trained with another data\.train"):
        train(write("abd"), show=quiet)
    train(write("abc"), show=quiet)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.path=somewhere"], "leave out path, or hidden_size, intermediate_size"),
        (["model.num_heads=3"], "hidden_size .64. must be a multiple of num_heads .3."),
        (["schedule.warm_up=7"], "warm_up must be from 0 to steps .6."),
        (["optimizer.lrs=1"], "there is no optimizer.lrs; did you mean lr"),
        (["run.keep=0"], "run: keep must be positive, got 0"),
        (["run.seed=-1"], "run: seed must be at least 0, got -1"),
        (["model.num_layers=0"], "model: num_layers must be positive, got 0"),
        (["optimizer.lr=nan"], "optimizer: lr must be positive, got nan"),
        (["optimizer.weight_decay=-0.1"], "optimizer: weight_decay must be at least 0"),
        (["loss.label_smoothing=2"], "loss: label_smoothing is a share, from 0 to 1, got 2"),
        (["data.validation=nowhere"], "nowhere has no shards"),
        (["batch.sequence_length=99999"], "not one row of 99,999"),
    ],
)
def test_wrong_settings_are_named_and_nothing_is_written(config, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(config(*settings), show=quiet)
    assert not (tmp_path / "run").exists()
