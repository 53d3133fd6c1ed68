"""Two profiles compared: a planted slow-down is found where it is, and two runs of the same code are the same."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from llama_fast.profiler.compare import compare
from llama_fast.profiler.report.terminal import show_comparison
from llama_fast.profiler.result import Distribution, Kernel, Profile
from llama_fast.reports.jsonfile import read_json, write_json
from tests.profiler.profiles import synthetic

EVERYWHERE = dict.fromkeys(("attention.qkv", "attention", "attention.out", "mlp.gate_up", "mlp.down", "head"), 1.2)


def changed(run):
    return {change.name.partition(":")[0] for change in run.kernels if change.is_significant}


def shown(found):
    console = Console(width=80, file=io.StringIO())
    show_comparison(found, console)
    return console.file.getvalue()


@pytest.mark.parametrize("machine", ["gpu", "cpu"])
def test_a_planted_slow_down_is_found(machine):
    found = compare(synthetic(machine=machine), synthetic(machine=machine, seed=1, slower=EVERYWHERE))
    assert found.is_regression
    run = found.runs[0]
    assert [change.name for change in run.regressions] == ["ITL"]
    assert 1.1 < run.latency[1].judged.ratio < 1.25
    assert changed(run) == set(EVERYWHERE)
    assert all(1.15 < change.judged.ratio < 1.25 for change in run.kernels if change.is_significant)
    text = shown(found)
    assert "REGRESSION: ITL of llama-fast" in text and "slower" in text
    assert max(map(len, text.splitlines())) <= 80


def test_one_slow_kernel_is_named_alone():
    found = compare(synthetic(), synthetic(seed=1, slower={"mlp.down": 1.2}))
    assert changed(found.runs[0]) == {"mlp.down"}
    assert "mlp.down" in shown(found).split("kernels of the token that changed")[1]
    assert max(found.runs[0].token, key=lambda change: change.seconds).name == "mlp.down"


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(6, 20))])
def test_the_same_code_is_the_same(seed):
    """Twice 20 profiles with outliers, of 9 kernels and 3 sides each."""
    found = compare(synthetic(seed=2 * seed + 2), synthetic(seed=2 * seed + 3))
    assert not found.is_regression
    assert found.notes == []
    assert all(changed(run) == set() for run in found.runs)
    assert "no regression" in shown(found)


def test_a_kernel_that_takes_next_to_nothing_is_not_reported():
    """2 us in 1.2 ms may double from one process to the next, and nobody should look at it."""
    before, after = (
        replace(profile, runs=[replace(profile.runs[0], kernels=[*profile.runs[0].kernels, tiny])])
        for profile, tiny in ((synthetic(), kernel_of(1e-6)), (synthetic(seed=1), kernel_of(2e-6)))
    )
    assert changed(compare(before, after).runs[0]) == set()


def kernel_of(seconds):
    return Kernel("_tiny_kernel", "norm", 1, seconds, 0, 0, 0, 0.0, samples=(seconds, seconds * 1.01, seconds) * 3)


def test_faster_is_no_regression():
    found = compare(synthetic(slower=EVERYWHERE), synthetic(seed=1))
    assert not found.is_regression
    assert found.runs[0].latency[1].judged.is_faster


def test_kernels_that_came_and_went_are_shown():
    before, after = synthetic(), synthetic(seed=1)
    run = after.runs[0]
    kernels = [replace(kernel, name="_new_kernel") if kernel.where == "mlp.down" else kernel for kernel in run.kernels]
    found = compare(before, replace(after, runs=[replace(run, kernels=kernels)]))
    rows = {change.name: (change.before, change.after) for change in found.runs[0].kernels if change.is_significant}
    assert rows == {
        "mlp.down: _new_kernel": (0.0, pytest.approx(kernels[5].seconds)),
        "mlp.down: _linear_rows_kernel": (pytest.approx(before.runs[0].kernels[5].seconds), 0.0),
    }
    assert "new" in shown(found) and "gone" in shown(found)


def test_a_slower_machine_is_suspected_where_the_others_are_slower_too():
    after = synthetic(slower=EVERYWHERE, seed=1)
    after = replace(after, limits=replace(after.limits, read_bytes_per_s=0.8 * after.limits.read_bytes_per_s))
    notes = compare(synthetic(), after).notes
    assert any(note.startswith("transformers got slower too (ITL;") for note in notes)
    assert "the machine's read stream is 0.80x what it was" in notes


def test_what_is_lost_is_told():
    """Neither a wrong result nor a setting that was not run again may pass for an even speed."""
    before, after = synthetic(), synthetic(seed=1)
    after = replace(after, runs=after.runs[:1], trust=replace(after.trust, logits_pass=False, same_bits=False))
    found = compare(replace(before, trust=replace(before.trust, logits_pass=True, same_bits=True)), after)
    assert found.is_regression and not found.runs[0].regressions
    assert "REGRESSION: the logits are no longer within their bound\nREGRESSION: two runs no longer give" in shown(
        found
    )
    assert "no regression" not in shown(found)
    assert any(note.startswith("only in the first profile: transformers") for note in found.notes)


def test_too_few_samples_judge_nothing():
    def first_samples(profile):
        run = profile.runs[0]
        latency = replace(run.latency, ttft=Distribution(run.latency.ttft.samples[:1]))
        return replace(profile, runs=[replace(run, latency=latency)])

    found = compare(first_samples(synthetic()), first_samples(synthetic(seed=1)))
    assert not found.runs[0].latency[0].is_significant
    assert "too few samples" in shown(found)


def test_what_cannot_be_compared_is_refused():
    other = synthetic()
    with pytest.raises(ValueError, match="two machines: gpu Imagined GPU, and none; --across-machines"):
        compare(other, synthetic(machine="cpu"))
    assert compare(other, synthetic(machine="cpu"), across_machines=True).runs
    with pytest.raises(ValueError, match="same prompt, new tokens and batch"):
        compare(other, synthetic(batches=(8,)))


def test_a_profile_survives_its_file(tmp_path):
    profile = synthetic()
    write_json(tmp_path / "profile.json", profile)
    read = read_json(tmp_path / "profile.json", Profile)
    assert read.runs[0].kernels[0].samples == pytest.approx(profile.runs[0].kernels[0].samples, rel=1e-5)
    found = compare(profile, read)
    assert not any(changed(run) for run in found.runs) and not found.is_regression
