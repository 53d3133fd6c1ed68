"""What a run writes down and says: files that are cut back, a line that can be trusted, and the share of the machine's rate."""

import csv
import json
import resource
from dataclasses import replace

import pytest
import torch

from llama_fast.profiler.measure.work import training_flops
from llama_fast.reports.units import span
from llama_fast.train import metrics as module
from llama_fast.train.loop import train
from llama_fast.train.metrics import Journal, Sample, StepMetrics, read_metrics, read_samples
from llama_fast.train.progress_lines import during
from llama_fast.train.speed import peak, published
from tests.parity import not_interpreted
from tests.train.conftest import longer


def step(number, **other):
    values = dict(
        step=number, loss=2.5, gradient_norm=0.5, learning_rate=1e-3, skipped=False, tokens=1000, seconds=0.5, data_seconds=0.01,
        memory=2_000_000, mfu=0.25,
    )  # fmt: skip
    return StepMetrics(**(values | other))


def test_what_was_written_is_read_and_cut_back(tmp_path):
    written = [step(1), step(2, skipped=True, loss=float("inf")), step(3, bits_per_byte=1.5, mfu=None), step(4)]
    journal = Journal(tmp_path, step=0)
    for each in written:
        journal.append(each)
    for at in (2, 4):
        journal.add_sample(Sample(at, "a\u2028b\n,\"c'"))
    assert read_metrics(tmp_path) == written and [each.step for each in read_samples(tmp_path)] == [2, 4]
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("5,2.5")  # a line that was cut off
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 5')
    Journal(tmp_path, step=3)
    assert read_metrics(tmp_path) == written[:3]
    assert read_samples(tmp_path) == [Sample(2, "a\u2028b\n,\"c'")]


def test_lines_that_a_full_disk_has_no_room_for_are_written_later(tmp_path):
    """No file may grow by more than 20 bytes: half of the line is written, and taken back."""
    journal = Journal(tmp_path, step=0)
    journal.append(step(1))
    limits, size = resource.getrlimit(resource.RLIMIT_FSIZE), (tmp_path / "metrics.csv").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        for number in (2, 3):
            with pytest.raises(OSError, match="too large"):
                journal.append(step(number))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.csv").stat().st_size == size
    journal.append(step(4))
    assert [each.step for each in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_file_of_an_older_version_goes_on(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,skipped,tokens,seconds\n1,2.5,False,10,0.5\n")
    Journal(tmp_path, step=1).append(step(2))
    older, newer = read_metrics(tmp_path)
    assert (older.step, older.loss, older.mfu, older.gradient_norm) == (1, 2.5, None, None) and newer == step(2)


def test_a_line_tells_of_the_steps_since_the_last_one():
    since = [step(8, loss=3.0), step(9, loss=float("nan"), skipped=True, seconds=1.5, mfu=0.05), step(10, loss=2.0)]
    assert during(since, steps=100, each=50.0, skipped=1) == (
        "step 10/100  loss 2.5000  norm 0.5  lr 1.00e-03  1,200 tokens/s  MFU 13 %  data 1.2 %  2.00 MB  1 h 15 min left  1 skipped"
    )
    assert during([step(9, mfu=None)], steps=9, each=1.0, skipped=0).endswith(
        "2,000 tokens/s  data 2.0 %  2.00 MB  done"
    )
    assert "loss none" in during([since[1]], steps=9, each=1.0, skipped=1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.4 s"), (12.3, "12 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3599.7, "1 h"), (6000, "1 h 40 min"), (190_000, "2 d 5 h")],
)  # fmt: skip
def test_spans(seconds, text):
    assert span(seconds) == text


def test_a_rate_is_told_where_it_is_known():
    assert published("NVIDIA H100 80GB HBM3").flops_per_s == 989e12
    assert published("NVIDIA A100-SXM4-80GB", processes=4).flops_per_s == 4 * 312e12
    assert published("NVIDIA A10").flops_per_s == 125e12 and published("NVIDIA A10G") is None
    measured = peak(torch.device("cpu"), torch.float32)
    assert measured is not None and measured.flops_per_s > 1e9 and "float32 product measured here" in measured.source


@not_interpreted
def test_a_run_says_what_it_takes_and_writes_what_it_gives(config):
    made, said = config("schedule.steps=4", 'run.sample="Once"'), []
    train(made, show=said.append)
    assert said[0] == "85,312 parameters; 4 steps of 384 tokens, 1,536 in all: 0.216 epochs"
    assert said[1].startswith("at least ") and "float32 product measured here" in said[1]
    weights = "weights 341 kB, gradients 1.02 MB, states 682 kB, activations "
    assert said[2].startswith("memory ") and weights in said[2] and said[2].endswith(" are free")
    assert [line.partition("/")[0] for line in said if "tokens/s" in line] == ["step 1", "step 2", "step 4"]
    with (made.run.out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    flops = training_flops(train_config(made), made.batch.sequence_length)
    rate = peak(torch.device("cpu"), torch.float32).flops_per_s
    for row in rows:
        assert float(row["mfu"]) == pytest.approx(384 * flops / float(row["seconds"]) / rate)
        assert int(row["memory"]) > 50e6 and 0 <= float(row["data_seconds"]) < float(row["seconds"])
    samples = [json.loads(line) for line in (made.run.out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [3, 4] and samples[0]["text"].startswith("Once")
    page = (made.run.out / "report.html").read_text()
    assert "<dt>step</dt><dd>4</dd><dd>of 4</dd>" in page and "step 3</h3>" in page
    train(longer(made, 6), show=said.append)
    assert "<dt>step</dt><dd>6</dd><dd>of 6</dd>" in (made.run.out / "report.html").read_text()
    assert [each.step for each in read_samples(made.run.out)] == [3, 4, 6]


def train_config(made):
    from llama_fast.train.checkpoints import decoder_config, folders

    return decoder_config(folders(made.run.out)[4])


@not_interpreted
def test_too_little_memory_is_said(config, monkeypatch):
    monkeypatch.setattr("llama_fast.train.progress_lines.available_bytes", lambda device: 1000)
    said = []
    train(config("schedule.steps=1"), show=said.append)
    assert said[2].endswith('more than the 1.00 kB that are free. Lower batch.rows, or set run.recompute = "full"')


@not_interpreted
def test_a_report_that_cannot_be_written_costs_nothing_else(config):
    made, said = config("schedule.steps=1"), []
    (made.run.out / "report.html").mkdir(parents=True)
    assert train(made, show=said.append).progress.step == 1
    assert any(line.startswith("no report of step 1: ") for line in said)


@not_interpreted
def test_tensorboard_that_is_not_there_is_named_before_anything_is_written(config, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    made = config()
    made = replace(made, run=replace(made.run, tensorboard=True))
    with pytest.raises(ValueError, match=r"run\.tensorboard needs the package tensorboard: pip install tensorboard"):
        train(made, show=print)
    assert not made.run.out.exists()


@not_interpreted
def test_tensorboard_shows_the_same_also_after_a_resume(config):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = config("run.tensorboard=true", "schedule.steps=3", 'run.sample="Once"')
    train(made, show=lambda line: None)
    with (made.run.out / "metrics.csv").open("a") as file:
        file.write("4,0,0,0,False,384,1,0,,,\n")
    Journal(made.run.out, step=4, tensorboard=True).append(step(5))  # of a step that no checkpoint knows
    train(longer(made, 6), show=lambda line: None)
    events = EventAccumulator(str(made.run.out / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(each.step, pytest.approx(each.loss)) for each in read_metrics(made.run.out)]
    assert [event.step for event in events.Tensors("sample/text_summary")] == [3, 6]
