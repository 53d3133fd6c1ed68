"""The performance page: what it says is what the files say."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_fast.benchmarks.report.measured import by_device
from llama_fast.benchmarks.report.page import page
from llama_fast.benchmarks.report.pictures import generating
from llama_fast.benchmarks.report.plots import _style, shows
from llama_fast.benchmarks.report.publish import DOCS, RESULTS, read_results, suite_cases, write_report
from llama_fast.benchmarks.shapes import LLAMA_3_2_1B
from llama_fast.benchmarks.suite.campaign import pack
from llama_fast.benchmarks.suite.pytest_groups import GroupRun, SuiteRuns
from llama_fast.benchmarks.suite.record import Record, Skipped, machine_folder
from llama_fast.benchmarks.suite.sweep import KeySweep, Sweep, Tried
from llama_fast.decoder.config import DecoderConfig
from llama_fast.kernels.tuned import Entry
from llama_fast.profiler.machine import _commit, machine
from llama_fast.profiler.measure.work import decoding_step_work, weight_elements
from llama_fast.profiler.result import Distribution, Profile
from llama_fast.reports import units
from llama_fast.reports.jsonfile import read_json, write_json
from tests.benchmarks.records import CPU_MACHINE, H100_LIMITS, H100_MACHINE, record, result, rich_record
from tests.parity import not_interpreted
from tests.profiler.profiles import synthetic

pytestmark = not_interpreted

FILE = "nvidia-h100-80gb-hbm3/ops.json"
CASES = {
    "cuda": [("rms_norm", "8192 x 4096", "bfloat16", "forward"), ("rope", "8192 x 4096", "bfloat16", "forward")],
    "cpu": [],
}


def text_of(*results, file=FILE, **more):
    return page(by_device({file: record(*results, **more)}), CASES)[0]


def row(text, implementation):
    """The cells of the only row of an implementation."""
    (line,) = (line for line in text.splitlines() if line.split(" | ")[1:2] == [implementation])
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_committed_page_and_pictures_are_those_of_the_committed_files():
    text, pictures = page(by_device(read_results(RESULTS)), suite_cases())
    assert (DOCS / "performance.md").read_text(encoding="utf-8") == text, "run python -m llama_fast.benchmarks.report"
    files = {path.relative_to(DOCS / "performance").as_posix(): path for path in (DOCS / "performance").rglob("*.svg")}
    assert sorted(files) == sorted(picture.file for picture in pictures)
    # not the bytes: those depend on the release of matplotlib
    old = [picture.file for picture in pictures if not shows(files[picture.file].read_text(encoding="utf-8"), picture)]
    assert not old, "run python -m llama_fast.benchmarks.report"


def test_the_same_files_give_the_same_bytes_whatever_was_there(tmp_path):
    write_report({FILE: rich_record()}, tmp_path / "a")
    (tmp_path / "a" / "performance" / "limits.svg").rename(tmp_path / "a" / "performance" / "old.svg")
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_report({FILE: rich_record()}, folder)
    a, b = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "a", tmp_path / "b")
    )
    assert a == b
    assert {path.name for path in a} == {
        "performance.md",
        "limits.svg",
        "rms_norm.svg",
        "attention.svg",
        "generate.svg",
        "generating.svg",
        "roofline.svg",
        "decoding.svg",
    }


def test_the_speed_of_generating_is_that_of_all_requests():
    made = [
        result("generate", f"1B, batch {batch}, 64 + 64 tokens", name, seconds, direction=direction)
        for batch in (1, 8) for name, seconds in (("PyTorch", 0.02), ("llama-fast", 0.01))
        for direction in ("time to first token", "inter-token latency")
    ]  # fmt: skip
    (device,) = by_device({FILE: record(*made)})
    picture = generating(device, device.contests)
    (panel,) = picture.panels
    assert panel.names == ("1B, batch 1, 64 + 64 tokens, bfloat16", "1B, batch 8, 64 + 64 tokens, bfloat16")
    shown = {series.name: [round(y) for _, y in series.points] for series in panel.series}
    assert shown == {"llama-fast": [100, 800], "PyTorch": [50, 400]}


def test_a_picture_that_is_not_the_pages_stays(tmp_path):
    (tmp_path / "performance").mkdir()
    (tmp_path / "performance" / "mine.svg").write_text("<svg/>")
    write_report({}, tmp_path)
    assert sorted(path.name for path in (tmp_path / "performance").iterdir()) == ["limits.svg", "mine.svg"]


def test_no_two_series_of_a_picture_look_the_same():
    """A roofline has a series for each op: more than there are colours."""
    names = ["llama-fast", "llama-fast fuse", *(op for op in suite_ops()), "PyTorch", "torch.compile", "Liger"]
    looks = [_style(name, names) for name in names]
    assert len(names) > 20 and len(set(looks)) == len(names)


def suite_ops():
    return dict.fromkeys(key[0] for keys in suite_cases().values() for key in keys)


def test_the_pictures_are_linked_and_know_their_data(tmp_path):
    path = write_report({FILE: rich_record()}, tmp_path)
    _, pictures = page(by_device({FILE: rich_record()}), CASES)
    linked = re.findall(r"!\[.*?\]\((.*?)\)", path.read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(f"performance/{picture.file}" for picture in pictures)
    changed = rich_record()
    changed.results[0].samples[:] = [1.0]
    _, others = page(by_device({FILE: changed}), CASES)
    for picture, other in zip(pictures, others, strict=True):
        svg = (tmp_path / "performance" / picture.file).read_text(encoding="utf-8")
        assert shows(svg, picture)
        assert shows(svg, other) == (not picture.file.endswith("rms_norm.svg"))  # it alone shows what was changed


def test_every_figure_of_a_row():
    shape = ("rms_norm", "8192 x 4096")
    text = text_of(
        result(*shape, "llama-fast", 100e-6, read=120_000_000, written=80_000_000, floor_s=75e-6, error=1.24e-3, bound=9.5e-3, note="peak memory 1 GiB"),
        result(*shape, "PyTorch", 150e-6, read=120_000_000, written=80_000_000, floor_s=75e-6, error=2.5e-3, bound=9.5e-3),
    )  # fmt: skip
    # 200 MB in 100 us; the floor of 75 us; 150 us beside it; p20 and p80 of samples() lie 1 % from the median
    assert row(text, "**llama-fast**") == [
        "8192 x 4096", "**llama-fast**", "**100 µs**", "99.0 to 101 µs", "2.00 TB/s", "75 %", "1.50x", "1.2e-03", "9.5e-03",
        "peak memory 1 GiB",
    ]  # fmt: skip
    assert row(text, "PyTorch")[2:9] == [
        "150 µs",
        "148 to 152 µs",
        "1.33 TB/s",
        "50 %",
        "1.00x",
        "2.5e-03",
        "9.5e-03",
    ]
    assert "bound by memory" in text


def test_figures_beyond_the_limit_are_counted():
    for seconds, said in ((100e-6, False), (70e-6, True)):
        text = text_of(result("rms_norm", "8192 x 4096", "llama-fast", seconds, floor_s=75e-6))
        assert (
            " 1 are over 100 % of the limit: it was measured too low, or a cache kept what they moved." in text
        ) == said


def test_what_is_bound_by_arithmetic_has_flops():
    text = text_of(
        result(
            "attention", "Llama-3.1-8B, 8192 tokens", "llama-fast", 1e-3, flops=400_000_000_000, floor_s=400e9 / 700e12
        )
    )
    assert row(text, "**llama-fast**")[4:6] == ["400 TFLOP/s", "57 %"]
    assert "bound by arithmetic" in text


def test_a_failure_has_no_speed_and_is_among_the_losses():
    text = text_of(result("rope", "8192 x 4096", "llama-fast", None), result("rope", "8192 x 4096", "PyTorch", 1e-4))
    assert row(text, "**llama-fast**") == [
        "8192 x 4096", "**llama-fast**", "**no figure**", "", "", "", "", "1.5e-03", "9.0e-03", "FAIL: error 1.0e-01 exceeds 9.0e-03",
    ]  # fmt: skip
    losses = text.partition("**Where llama-fast loses**")[2].partition("###")[0]
    assert "- rope, 8192 x 4096, forward, bfloat16: FAIL: error 1.0e-01 exceeds 9.0e-03" in losses
    assert "| rope | forward, bfloat16 | 1 |  |  |  | 1 |" in text


@pytest.mark.parametrize(
    ("seconds", "counts", "is_listed"),
    [(1.25e-4, " |  | 1 | ", True), (1.01e-4, " | 1 |  | ", False), (0.8e-4, "1 |  |  | ", False)],
)
def test_a_lost_comparison_is_listed_and_noise_is_none(seconds, counts, is_listed):
    shape = ("rms_norm", "8192 x 4096")
    text = text_of(
        result(*shape, "llama-fast", seconds), result(*shape, "PyTorch", 2e-4), result(*shape, "Liger", 1e-4)
    )
    losses = text.partition("**Where llama-fast loses**")[2].partition("###")[0]
    listed = "| rms_norm | 8192 x 4096 | forward, bfloat16 | 125 µs | 100 µs | Liger | 1.25x |" in losses
    assert listed == is_listed
    assert ("Nowhere beyond the noise." in losses) == (not is_listed)
    assert f"| rms_norm | forward, bfloat16 | 1 | {counts}".replace("  ", " ") in text.replace("  ", " ")


def test_a_machine_that_slows_down_hides_no_loss():
    """Both take turns: what both suffer is no noise of the one against the other."""
    both = [1e-4 * (1 + i / 20) for i in range(20)]
    ours, theirs = (result("rope", "8192 x 4096", name, 1e-4) for name in ("llama-fast", "PyTorch"))
    ours, theirs = replace(ours, samples=[1.1 * each for each in both]), replace(theirs, samples=both)
    assert "| rope | 8192 x 4096 | forward, bfloat16 | 162 µs | 148 µs | PyTorch | 1.10x |" in text_of(ours, theirs)


def test_what_is_slower_within_the_noise_is_counted_beside_the_losses():
    ours, theirs = (result("rope", "8192 x 4096", name, 1e-4) for name in ("llama-fast", "PyTorch"))
    ours = replace(ours, samples=[1e-4 * each for each in (0.8, 1.6, 0.9, 1.3, 1.1, 0.7, 1.5, 1.2, 0.85, 1.4)])
    text = text_of(ours, theirs)
    assert (
        "Nowhere beyond the noise.\n\nSizes at which its median is longer by 3 % or more, but within the noise (above they count as even): 1."
        in text
    )
    assert "within the noise (" not in text_of(theirs, replace(ours, samples=theirs.samples))


def test_who_could_not_run_and_what_a_run_warned_of_are_named():
    text = text_of(result("rms_norm", "8192 x 4096", "llama-fast", 1e-4), warnings=["the clocks moved"])
    assert "- Liger: liger-kernel is not installed (rms_norm)" in text
    assert "- the clocks moved" in text


def test_what_files_say_is_shown_as_it_is_and_not_as_html():
    odd = "TypeError: <class 'int'> | <b>"
    files = {
        FILE: record(
            result("rope", "8192 x 4096", "llama-fast", None, failure=odd),
            result("rope", "8192 x 4096", "PyTorch", 1e-4, note="<i>"),
            skipped=[Skipped("rope", "Liger", odd)], warnings=[odd],
        ),
        "nvidia-h100-80gb-hbm3/tests.json": SuiteRuns(H100_MACHINE, True, [GroupRun(["tests"], 1.0, 1, 1, 0, [odd])]),
        "nvidia-h100-80gb-hbm3/profile.json": replace(synthetic(model="<b>"), machine=H100_MACHINE),
    }  # fmt: skip
    text, _ = page(by_device(files), CASES)
    assert set(re.findall(r"</?(\w+)>", text)) == {"details", "summary"}
    # a table, and the lists of losses, of who is missing, of warnings, of failed tests
    assert text.count("TypeError: &lt;class 'int'> \\| &lt;b>") == 5


def test_what_was_not_measured_is_counted():
    text = text_of(result("rms_norm", "8192 x 4096", "llama-fast", 1e-4))
    missing = text.partition("## What has not been measured")[2]
    assert "| op | NVIDIA H100 80GB HBM3 | A100 | H200 | B200 | MI300X | a CPU |" in missing
    assert "| rms_norm | 1 of 1 | 0 of 1 | 0 of 1 | 0 of 1 | 0 of 1 | no such case |" in missing
    assert "| rope | 0 of 1 | 0 of 1 |" in missing
    assert "Nothing at all has been measured on: A100, H200, B200, MI300X, a CPU." in missing


def test_what_failed_was_not_measured():
    text = text_of(result("rms_norm", "8192 x 4096", "llama-fast", None))
    assert "| rms_norm | 0 of 1 |" in text.partition("## What has not been measured")[2]


def test_a_latency_that_another_side_wins_is_among_the_losses():
    """A profile's ratios are those of its sides: transformers' time to first token is halved here, and its tokens stay slower."""
    profile = replace(synthetic(against=("transformers",)), machine=H100_MACHINE)
    ours, theirs = profile.runs
    ttft = Distribution(tuple(each / 2 for each in ours.latency.ttft.samples))
    won = replace(profile, runs=[ours, replace(theirs, latency=replace(theirs.latency, ttft=ttft))])
    for each, expected in ((profile, 0), (won, 1)):
        text, _ = page(by_device({FILE: each}), CASES)
        losses = text.partition("**Where llama-fast loses**")[2].partition("Latency of whole models")[0]
        assert (
            losses.count("| profile | example/Imagined-1B, 512 prompt tokens, 128 new, batch 1 | TTFT, bfloat16 | ")
            == expected
        )
        assert losses.count(" | transformers | 2.00x |") == expected and "ITL" not in losses
        assert ("Nowhere beyond the noise." in losses) == (not expected)


def test_without_files_the_page_says_that_nothing_was_measured(tmp_path):
    text = write_report(read_results(tmp_path / "none"), tmp_path).read_text(encoding="utf-8")
    assert "**No GPU has been measured yet.**" in text
    assert "2.472 GB" in text and "15.010 GB" in text
    assert "published" in text and "| measured |" not in text
    assert [path.name for path in tmp_path.rglob("*.svg")] == ["limits.svg"]


def test_the_arithmetic_as_it_is_printed():
    """The line with the numbers gives what it says, which is what the profiler counts for a step."""
    text, _ = page([], CASES)
    formula, printed = re.search(r"For Llama-3.2-1B: 2 B x (.*) = (.*) GB", text).groups()
    counted = 2 * eval(formula.replace("x", "*").replace("[", "(").replace("]", ")"))
    config = DecoderConfig.from_huggingface(LLAMA_3_2_1B.config())
    assert counted == 2 * weight_elements(config)[0] and printed == f"{1e-9 * counted:.3f}"
    one, two = (decoding_step_work(config, 1, context, torch.bfloat16).read for context in (1000, 1001))
    assert "| Llama-3.2-1B, bfloat16 | 2.472 GB | 32 KiB | 75,428 tokens |" in text
    assert two - one == 32 * 1024 and counted // (two - one) == 75_428


def test_the_limits_of_a_device_stand_in_the_arithmetic():
    text = text_of(result("rms_norm", "8192 x 4096", "llama-fast", 1e-4))
    # 2.472 GB and 15.01 GB at 3 TB/s
    _, pictures = page(by_device({FILE: record()}), CASES)
    model, _, batch = pictures[0].panels
    assert model.series[0].name == "NVIDIA H100 80GB HBM3, measured"
    # 3 TB/s over 2 x 1,235,814,400 parameters and, for each of 1024 tokens, 2 x 16 layers x 8 heads x 64 numbers of 2 bytes
    assert model.series[0].points[0] == (1024, pytest.approx(3e12 / (2_471_628_800 + 1024 * 32768)))
    assert batch.series[0].points[3] == (8, pytest.approx(24)) and batch.series[0].points[-1] == (2048, 700)
    expected = "| NVIDIA H100 80GB HBM3 | 3.00 TB/s | 700 TFLOP/s | 233 FLOP/B | 824 µs = 1,214 tokens/s | 5.00 ms = 199.9 tokens/s | measured |"
    assert expected in text


def test_a_cpu_is_no_line_beside_the_gpus():
    files = {FILE: record(), "cpu-amd-epyc-2-threads/a.json": record(gpu=False)}
    text, pictures = page(by_device(files), CASES)
    names = {series.name for panel in pictures[0].panels for series in panel.series}
    assert "NVIDIA H100 80GB HBM3, measured" in names and not any("AMD" in name for name in names)
    assert "| AMD EPYC, 2 threads | 20.0 GB/s | 400 GFLOP/s | 20 FLOP/B |" in text


def test_two_files_with_results_of_the_same_work_are_refused():
    """They were not measured in turns, so they are no comparison."""
    ours, theirs = (result("rms_norm", "8192 x 4096", name, 1e-4) for name in ("llama-fast", "PyTorch"))
    records = {"nvidia-h100-80gb-hbm3/a.json": record(ours), "nvidia-h100-80gb-hbm3/b.json": record(theirs)}
    with pytest.raises(
        ValueError, match=r"a\.json and .*b\.json both have results of rms_norm, 8192 x 4096.*remove one"
    ):
        page(by_device(records), CASES)


def test_files_are_read_from_their_machines_folders(tmp_path):
    for measured_on, gpu in ((H100_MACHINE, True), (CPU_MACHINE, False)):
        folder = tmp_path / machine_folder(measured_on)
        folder.mkdir()
        write_json(folder / "ops.json", record(result("rms_norm", "8192 x 4096", "llama-fast", 1e-4), gpu=gpu))
        (folder / "log.txt").write_text("what a campaign leaves beside its results")
        pack(folder)
    assert list(read_results(tmp_path)) == ["cpu-amd-epyc-2-threads/ops.json", "nvidia-h100-80gb-hbm3/ops.json"]
    assert [device.name for device in by_device(read_results(tmp_path))] == [
        "NVIDIA H100 80GB HBM3",
        "AMD EPYC, 2 threads",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cpu/broken.json", '{"schema": 1, "machine": ', "broken.json is no result file"),
        ("cpu/other.json", '{"settings": {}}', "other.json is no Record file"),
        ("cpu/number.json", "7", "number.json is no result file"),
        ("cpu/notes.txt", "slow today", "notes.txt is no result file"),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path, name, content, message):
    path: Path = tmp_path / name
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path)


def test_a_file_in_another_machines_folder_is_named(tmp_path):
    (tmp_path / "cpu").mkdir()
    write_json(tmp_path / "cpu" / "ops.json", record())
    with pytest.raises(ValueError, match=r"cpu/ops\.json was measured on another machine.*nvidia-h100-80gb-hbm3"):
        read_results(tmp_path)


def test_a_profile_adds_latencies_and_speed_over_context(tmp_path):
    profile = synthetic()
    folder = tmp_path / machine_folder(profile.machine)
    folder.mkdir()
    write_json(folder / "profile.json", profile)
    text, pictures = page(by_device(read_results(tmp_path)), CASES)
    assert [picture.file for picture in pictures] == ["limits.svg", f"{folder.name}/decoding.svg"]
    read = read_json(folder / "profile.json", Profile)
    ours = read.runs[0]
    cells = row(text, "llama-fast")
    assert cells[0] == "example/Imagined-1B, bfloat16"
    assert cells[5] == units.duration(ours.latency.itl.median)
    assert cells[8] == units.duration(next(part.seconds for part in ours.token.parts if part.kind == "floor"))
    points = [point for point in read.contexts if point.measured is not None and point.side == "llama-fast"]
    (series,) = (each for each in pictures[1].panels[0].series if each.name == "llama-fast")
    assert series.points == tuple((point.context, 1 / point.measured.median) for point in points)


def test_a_sweep_and_a_run_of_the_tests_are_told(tmp_path):
    folder = tmp_path / machine_folder(H100_MACHINE)
    folder.mkdir()
    entry = Entry(
        "linear", "sm_90", 132, "bfloat16", (16, 4096, 4096), {"block_m": 16, "num_warps": 4}, "H100", ("one",), 9e-6, 12e-6, 1e-3, 2e-3
    )  # fmt: skip
    tried = [Tried(None, [12e-6], 1e-3, 2e-3, None), Tried(entry.plan, [9e-6], 1e-3, 2e-3, None)]
    keys = [
        KeySweep("linear", (16, 4096, 4096), ["one"], tried, entry),
        KeySweep("softmax", (9, 9), ["two"], tried[:1], None),
    ]
    write_json(folder / "sweep.json", Sweep(H100_MACHINE, "sm_90", 132, True, None, keys))
    runs = [GroupRun(["tests/kernels"], 60.0, 900, 1, 7, ["test_rope: AssertionError\nlong"])]
    write_json(folder / "tests.json", SuiteRuns(H100_MACHINE, False, runs))
    text, pictures = page(by_device(read_results(tmp_path)), CASES)
    assert [picture.file for picture in pictures] == ["limits.svg"]
    assert "A sweep tried 3 plans for 2 sizes, and replaced 1 of the arithmetic's choices." in text
    assert "| linear | 16 x 4096 x 4096 | block_m 16, num_warps 4 | 0.75x |" in text
    assert "| `tests/kernels` | 900 | 1 | 7 |\n| the rest | not run | | |" in text
    assert "- failed: test_rope: AssertionError\n" in text
    assert "| measured |" not in text  # no limits in these files


def test_day_and_commit_are_told_and_a_changed_checkout_is_not_its_commit():
    commits = ("0123456789abcdef" + 24 * "0", "0123456789abcdef" + 24 * "0" + "-dirty")
    files = {
        f"nvidia-h100-80gb-hbm3/{i}.json": Record(
            H100_MACHINE | {"commit": commit, "date": "2030-01-02"}, H100_LIMITS, {}
        )
        for i, commit in enumerate(commits)
    }
    text, _ = page(by_device(files), CASES)
    assert "| commit | 0123456789ab<br>0123456789ab-dirty |" in text and "| date | 2030-01-02 |" in text
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", machine(torch.device("cpu"))["date"])


def test_the_commit_is_that_of_llama_fast_and_not_of_the_project_it_is_used_in(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_FAST_COMMIT", "told")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.chdir(tmp_path)
    assert machine(torch.device("cpu"))["commit"] != _commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", _commit(tmp_path))
    (tmp_path / "sub").mkdir()
    assert _commit(tmp_path / "sub") == "told"
    monkeypatch.setenv("PATH", "")
    assert _commit(tmp_path) == "told"


def test_what_moved_between_the_files_of_a_device_stands_as_a_span():
    def part(clock):
        return Record(H100_MACHINE | {"gpu_state": H100_MACHINE["gpu_state"] | {"clocks.sm": clock}}, H100_LIMITS, {})

    files = {f"nvidia-h100-80gb-hbm3/{name}.json": part(clock) for name, clock in (("a", "1980 MHz"), ("b", "345 MHz"))}
    text, _ = page(by_device(files), CASES)
    assert "| SM clock before each part | 345 to 1980 MHz |" in text
    assert "| memory clock | 2619 MHz |" in text
    assert "| `nvidia-h100-80gb-hbm3/a.json`, `nvidia-h100-80gb-hbm3/b.json` | 3.00 TB/s |" in text


def test_work_that_fits_a_cpus_caches_has_no_limit():
    small = dict(read=1 << 20, written=1 << 20, floor_s=1e-4, dtype="float32")
    text = text_of(result("softmax", "64 x 4096", "llama-fast", 1e-4, **small), file="cpu/ops.json", gpu=False)
    assert row(text, "**llama-fast**")[4:6] == ["21.0 GB/s", "in cache"]
