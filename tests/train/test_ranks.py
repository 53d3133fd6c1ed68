"""Runs that ranks share: the bits of one process, whoever has saved and whoever goes on, and errors that are told by name."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama_fast.train import checkpoints
from llama_fast.train.export import export
from llama_fast.train.loop import train
from llama_fast.train.ranks import Layout, PairwiseReduceScatter, Ranks, joined, told_by_this
from tests.parity import not_interpreted
from tests.train.conftest import CONFIG
from tests.train.rank_checks import ADAPTED, EIGHT, ODD, UNSAVED, run
from tests.train.test_loop import moments, numbers, quiet, rows, same

pytestmark = not_interpreted

ROOT = Path(__file__).parents[2]


def torchrun(count, *arguments, **options):
    """Starts a module on so many ranks of one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def check(count, folder, *names):
    process = torchrun(count, "tests.train.rank_checks", folder, *names)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said


def prepared(corpus, folder):
    """With a config, and another that begins with the model that will be exported to `folder / "hf"`."""
    text = CONFIG.format(root=corpus, out=folder / "run")
    (folder / "train.toml").write_text(text)
    model = f'[model]\npath = "{folder / "hf"}"\n\n'
    (folder / "adapted.toml").write_text(re.sub(r"\[model\].*?(?=\[batch\])", model, text, flags=re.DOTALL))
    return folder


def stopped_after_three(config):
    def stop(line):
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(replace(config, run=replace(config.run, log_every=3)), show=stop).progress.step == 3


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory):
    """What two ranks did, and beside it what one process did."""
    folder = prepared(corpus, tmp_path_factory.mktemp("two"))
    train(run(folder, "whole", *EIGHT), show=quiet)
    train(run(folder, "whole odd", *ODD, *UNSAVED), show=quiet)
    stopped_after_three(run(folder, "odd", *ODD, *UNSAVED))
    export(folder / "whole", folder / "hf")
    train(run(folder, "whole adapted", *ADAPTED, *UNSAVED, file="adapted.toml"), show=quiet)
    stopped_after_three(run(folder, "adapted", *ADAPTED, *UNSAVED, file="adapted.toml"))
    check(2, folder, "stopped", "odd", "adapted", "not_a_number", "fused", "full_disk", "tensor_parallel_losses")
    return folder


def test_two_ranks_stop_together_and_one_goes_on_to_the_same_bits(two):
    """Only one of the ranks was asked to stop."""
    whole, stopped = run(two, "whole", *EIGHT), run(two, "stopped", *EIGHT)
    assert list(checkpoints.folders(stopped.run.out)) == [3]
    assert numbers(stopped) == numbers(whole)[:3]
    said = []
    train(stopped, show=said.append)
    assert "goes on after step 3" in said and not any("not to the bits" in line for line in said)
    assert numbers(stopped) == numbers(whole)
    assert same(moments(stopped, 6), moments(whole, 6))


@pytest.mark.parametrize(
    ("name", "settings", "file"), [("odd", ODD, "train.toml"), ("adapted", ADAPTED, "adapted.toml")]
)
def test_two_ranks_go_on_with_what_one_has_saved_to_the_same_bits(two, name, settings, file):
    """Muon in bfloat16, with rows and micro-batches that two do not share evenly; adapters of a model in bfloat16, with dropout."""
    whole, ours = (run(two, each, *settings, *UNSAVED, file=file) for each in (f"whole {name}", name))
    assert numbers(ours) == numbers(whole)
    assert same(moments(ours, 6), moments(whole, 6))


@pytest.mark.parametrize("name", ["nan", "fused"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(two, name):
    """Also by fused AdamW, as on a GPU."""
    made = run(two, name)
    assert [row["skipped"] for row in rows(made)] == ["False", "True", "False"]
    first, second, third = (moments(made, step) for step in (1, 2, 3))
    assert same(first, second) and not same(second, third)
    assert all(torch.isfinite(each).all() for each in third.values())


def test_a_disk_that_is_full_for_one_rank_is_told_by_the_first_and_nothing_is_left(two):
    said = (two / "said.0").read_text()
    assert "no checkpoint of step 2: [Errno 5] the checkpoint was not written (" in said
    assert (two / "said.1").read_text() == ""
    assert [path.name for path in (two / "full" / "checkpoints").iterdir()] == ["step-00000004"]


def test_ranks_say_on_what_they_run(config):
    exact, other = Layout(2, 1, 1, True), Layout(3, 1, 1, True)
    assert exact.gives_the_bits_of(Layout(8, 1, 1, True)) and not exact.gives_the_bits_of(Layout(2, 1, 2, True))
    assert other.gives_the_bits_of(other) and not other.gives_the_bits_of(exact)
    assert not Layout(2, 2, 1, True).gives_the_bits_of(exact) and not Layout(2, 1, 1, False).gives_the_bits_of(exact)
    assert str(Layout(2, 2, 1, False)) == "4 ranks, 2 of them to a micro-batch, of 1 thread, without exact sums"
    made, said = config("schedule.steps=1", "run.exact=false"), []
    train(made, show=quiet)
    train(config("schedule.steps=2"), show=said.append)
    expected = (
        "the steps before were done on 1 rank of 1 thread, without exact sums: it goes on right, but not to the bits "
    )
    assert any(line.startswith(expected) for line in said)


def test_ranks_sum_in_pairs(monkeypatch):
    """As `GradientSum` does: what four ranks have is 1, s, s, s, and 1 + s = 1."""
    monkeypatch.setattr("torch.distributed.all_to_all_single", lambda got, given, group: got.copy_(given))
    small = 2.0**-24
    given, got = torch.tensor([1.0, small, small, small]).repeat_interleave(5), torch.empty(5)
    PairwiseReduceScatter()(got, given, SimpleNamespace(size=lambda: 4), None)
    assert (got == 1 + 2 * small).all()


def test_work_is_dealt_in_turns():
    ranks = [Ranks() for _ in range(3)]
    for number, each in enumerate(ranks):
        each.number, each.count = number, 3
    assert [each.turns(7) for each in ranks] == [[0, 3, 6], [1, 4, None], [2, 5, None]]


def test_what_is_wrong_is_told_by_one_rank(monkeypatch):
    with pytest.raises(ValueError, match=r"ranks.tensor_parallel must divide the number of ranks \(1\), got 2"):
        joined(2, torch.device("cpu")).__enter__()
    assert told_by_this("it is wrong") == "it is wrong"
    monkeypatch.setenv("RANK", "1")
    waits = []
    monkeypatch.setattr("llama_fast.train.ranks.time.sleep", waits.append)
    assert told_by_this("it is wrong") == "rank 1: it is wrong" and waits == [3.0]


def test_what_tensor_parallelism_does_not_go_with(config):
    for setting in ("optimizer.kind=muon", "lora={}"):
        with pytest.raises(ValueError, match=r"ranks\.tensor_parallel must be 1"):
            config("model={path='x'}", setting, "ranks.tensor_parallel=2")


class Run:
    """Two ranks in a run of 12 steps that saves at each, and what they say."""

    def __init__(self, folder):
        self.process = torchrun(
            2, "llama_fast.train", folder / "train.toml", *SAVING, "--set", f"run.out={folder / 'run'}"
        )
        self.said = []

    def waits_for(self, *starts):
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith(starts):
                return
        raise AssertionError("".join(self.said))

    def waits_for_a_checkpoint_to_be_written(self, folder):
        while not any(folder.glob("*.tmp")):
            assert self.process.poll() is None

    def kill(self, *ranks):
        """Kills ranks, or all there is, as only the machine does, and returns all that was said until the others had ended too."""
        there = ranks_of(self.process.pid)
        for process in [there[rank] for rank in ranks] or [self.process.pid, *there]:
            os.kill(process, signal.SIGKILL)
        self.said.append(self.process.communicate(timeout=120)[0])
        assert self.process.returncode == (1 if ranks else -signal.SIGKILL)
        return "".join(self.said)


SAVING = [
    argument
    for setting in ("run.save_every=1", "run.evaluate_every=0", "run.log_every=1", "schedule.steps=12")
    for argument in ("--set", setting)
]


def ranks_of(launcher):
    """The processes that a launcher has started, in order."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                    found.append(int(folder.name))
    return sorted(found)


@pytest.fixture(scope="module")
def twelve(corpus, tmp_path_factory):
    """The uninterrupted run."""
    folder = prepared(corpus, tmp_path_factory.mktemp("twelve"))
    made = run(folder, "run", *SAVING[1::2])
    train(made, show=quiet)
    return made


def goes_on(config, twelve):
    """One process, to the bits of the uninterrupted run."""
    there = checkpoints.folders(config.run.out)
    said = []
    assert train(config, show=said.append).progress.step == 12
    assert not there or f"goes on after step {max(there)}" in said
    assert numbers(config) == numbers(twelve)
    assert same(moments(config, 12), moments(twelve, 12))
    assert not list((config.run.out / "checkpoints").glob("*.tmp"))


def test_a_killed_rank_ends_the_run_and_loses_a_step_or_two(corpus, tmp_path, twelve):
    running = Run(prepared(corpus, tmp_path))
    running.waits_for("step 6/")
    said = running.kill(1)
    assert "error: another rank has ended, or cannot be reached" in said
    made = run(tmp_path, "run", *SAVING[1::2])
    assert max(checkpoints.folders(made.run.out)) >= 4
    goes_on(made, twelve)


@pytest.mark.nightly
@pytest.mark.parametrize("attempt", range(20))
def test_a_kill_at_any_time_loses_no_checkpoint(corpus, tmp_path, twelve, attempt):
    """Of one rank, the other one, or all there is; at some time, or while a checkpoint is written."""
    running = Run(prepared(corpus, tmp_path))
    running.waits_for(f"step {1 + attempt % 10}/")
    if attempt % 2:
        running.waits_for_a_checkpoint_to_be_written(tmp_path / "run" / "checkpoints")
        time.sleep(random.Random(attempt).random() * 0.05)
    else:
        time.sleep(random.Random(attempt).random() * 0.2)
    running.kill(*[(0,), (1,), ()][attempt % 3])
    goes_on(run(tmp_path, "run", *SAVING[1::2]), twelve)


@pytest.mark.nightly
def test_compiled_layers_on_ranks(corpus, tmp_path):
    """Two ranks that take turns have the bits of one; two to a micro-batch are as good but for roundings."""
    folder = prepared(corpus, tmp_path)
    whole, dealt, cut = (
        run(folder, name, *EIGHT, "run.compile=true") for name in ("whole", "compiled 1", "compiled 2")
    )
    train(whole, show=quiet)
    check(2, folder, "compiled")
    assert numbers(dealt) == numbers(whole) and same(moments(dealt, 6), moments(whole, 6))
    for ours, theirs in zip(rows(cut), rows(whole), strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-6)


@pytest.mark.nightly
def test_other_numbers_of_ranks(two, corpus, tmp_path):
    """Four ranks go on with what two have saved; three, and two by two, are as good but for roundings."""
    folder = prepared(corpus, tmp_path)
    check(2, folder, "stopped")
    stopped_after_three(run(folder, "odd", *ODD, *UNSAVED))
    check(4, folder, "gone_on", "odd", "both_kinds", "tensor_parallel_losses")
    check(3, folder, "three")
    whole = run(two, "whole", *EIGHT)
    assert same(moments(run(folder, "stopped", *EIGHT), 6), moments(whole, 6))
    odd, whole_odd = run(folder, "odd", *ODD, *UNSAVED), run(two, "whole odd", *ODD, *UNSAVED)
    assert numbers(odd) == numbers(whole_odd) and same(moments(odd, 6), moments(whole_odd, 6))
    for name in ("both", "three"):
        for ours, theirs in zip(rows(run(folder, name)), rows(whole), strict=True):
            assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-6)
