"""Kernels of a replay are told which op they belong to, by order and name; what cannot be told is a row of its own."""

import pytest
import torch

from llama_fast.profiler.attribute.counting import Op
from llama_fast.profiler.attribute.kernels import (
    NOT_ATTRIBUTED,
    Entry,
    Event,
    floor_of,
    kernel_entries,
    match,
    operator_entries,
    table,
)
from llama_fast.profiler.attribute.trace import read_trace
from llama_fast.profiler.measure.limits import Limits
from llama_fast.profiler.measure.phases import by_token
from llama_fast.profiler.measure.sides import Generation
from llama_fast.profiler.measure.work import Work

LIMITS = Limits(1e9, 1e9, {"float32": 1e9, "bfloat16": 4e9}, 1e-6, None, 0)
STEP = ["norm", "qkv", "split", "combine", "add", "norm", "up", "add"]


def op(name: str, where: str, **work: int) -> Op:
    return Op(name, where, "forward", Work(**work), torch.bfloat16, 0.0, 0.0)


def events(names, *, ops=None, start=0.0, each=2.0, gap=1.0) -> list[Event]:
    return [
        Event(name, start + i * (each + gap), each, None if ops is None else ops[i]) for i, name in enumerate(names)
    ]


def test_the_same_order_is_matched_one_to_one():
    assert match(STEP, STEP) == list(range(len(STEP)))
    assert match(STEP * 40, STEP * 40) == list(range(40 * len(STEP)))


def test_a_missing_and_an_extra_kernel_leave_the_others_in_place():
    without = STEP[:3] + STEP[4:]
    assert match(without, STEP) == [0, 1, 2, 4, 5, 6, 7]
    with_one_more = [*STEP[:3], "fill", *STEP[3:]]
    assert match(with_one_more, STEP) == [0, 1, 2, None, 3, 4, 5, 6, 7]


def test_kernels_that_changed_places_are_matched_by_name():
    names = ["norm", "split", "qkv", "combine"]
    assert match(names, ["norm", "qkv", "split", "combine"]) == [0, 2, 1, 3]


def test_a_name_that_is_there_more_often_on_one_side_is_not_guessed():
    found = match(["b", "a", "x", "x"], ["a", "x", "b"])
    assert found[:2] == [2, 0] or found[1] == 0  # order first
    assert found.count(None) == 1  # one of two x has no counterpart
    assert match(["x", "x"], ["y"]) == [None, None]
    assert match([], STEP) == [] and match(STEP, []) == [None] * len(STEP)


def test_no_counterpart_is_taken_twice():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        names = [STEP[i] for i in torch.randint(0, 6, (30,), generator=generator).tolist()]
        known = [STEP[i] for i in torch.randint(0, 6, (30,), generator=generator).tolist()]
        found = [at for at in match(names, known) if at is not None]
        assert len(found) == len(set(found))
        assert all(known[at] == name for name, at in zip(names, match(names, known), strict=True) if at is not None)


def test_entries_have_their_ops_place_and_work_and_own_time():
    ops = [op("qkv", "attention.qkv", read=800), op("attend", "attention", read=90, flops=7)]
    known = events(["gemm", "split", "combine"], ops=[0, 1, 1], start=100.0)
    replay = events(["gemm", "split", "combine", "fill"], each=2.0, gap=1.0)
    replay[2] = Event("combine", 4.5, 4.0)  # begins while split still runs, and takes longer
    found = kernel_entries(replay, known, ops)
    assert [entry.where for entry in found] == ["attention.qkv", "attention", "attention", NOT_ATTRIBUTED]
    assert [entry.work for entry in found] == [ops[0].work, Work(), ops[1].work, Work()]  # once, at the longest
    assert [entry.seconds for entry in found] == [2.0, 2.0, 3.5, 2.0]
    assert [entry.gap for entry in found] == [0.0, 1.0, 0.0, 0.5]
    assert sum(entry.seconds + entry.gap for entry in found) == 11.0  # from the first start to the last end


def test_a_kernel_inside_of_a_longer_one_takes_no_time_of_its_own():
    found = kernel_entries([Event("a", 0.0, 10.0), Event("b", 2.0, 1.0), Event("c", 11.0, 1.0)], [], [])
    assert [(entry.seconds, entry.gap) for entry in found] == [(10.0, 0.0), (0.0, 0.0), (1.0, 1.0)]


def test_what_was_launched_by_no_op_attributes_nothing():
    known = [Event("gemm", 0.0, 1.0), Event("gemm", 2.0, 1.0, op=0)]
    found = kernel_entries([Event("gemm", 0.0, 1.0)], known, [op("mm", "mlp.down", read=5)])
    assert found[0].where == "mlp.down"


def test_the_gap_before_an_operator_is_of_the_forward_pass():
    timed = [
        Op("mm", "", phase, Work(), torch.float32, 1.0, ended)
        for phase, ended in (("inputs", 1.0), ("forward", 4.0), ("forward", 5.5), ("sample", 9.0))
    ]
    assert [entry.gap for entry in operator_entries([], timed)] == [0.0, 0.0, 0.5, 0.0]


def test_the_table_sums_calls_and_ranks_by_what_can_be_won():
    def step(slow: float) -> list[Entry]:
        one = Entry("gemm", "mlp.down", slow / 2, Work(read=1000), torch.bfloat16)
        return [one, one, Entry("norm", "norm", 9e-6, Work(read=1000, written=1000)), Entry("gemm", "head", 5e-6)]

    rows = table([step(8e-6), step(10e-6), step(30e-6)], LIMITS)
    down = next(row for row in rows if row.where == "mlp.down")
    assert (down.calls, down.seconds, down.read) == (2, pytest.approx(10e-6), 2000)
    assert down.samples == pytest.approx((8e-6, 10e-6, 30e-6)) and down.floor == pytest.approx(2e-6)
    assert [row.where for row in rows] == ["mlp.down", "norm", "head"]
    assert [row.winnable for row in rows] == pytest.approx([8e-6, 7e-6, 5e-6])
    assert table([], LIMITS) == []


def test_floors_are_the_larger_of_bytes_and_flops_in_the_ops_dtype():
    assert floor_of(Entry("a", "", 0, Work(read=100, flops=800), torch.bfloat16), LIMITS) == pytest.approx(200e-9)
    assert floor_of(Entry("a", "", 0, Work(read=300, flops=800), torch.bfloat16), LIMITS) == pytest.approx(300e-9)
    assert floor_of(Entry("a", "", 0, Work(flops=800), torch.float64), LIMITS) == pytest.approx(800e-9)


def span(name: str, cat: str, ts: float, dur: float, correlation: int | None = None) -> dict:
    args = {} if correlation is None else {"args": {"correlation": correlation}}
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, **args}


def test_a_trace_is_read_launch_by_launch_and_graph_by_graph():
    trace = read_trace(
        [
            {"ph": "M", "name": "process_name"},
            span("llama-fast start", "user_annotation", 5000.0, 1.0),
            span("llama-fast op 0", "user_annotation", 5010.0, 10.0),
            span("llama-fast op 0", "gpu_user_annotation", 5030.0, 10.0),
            span("cuLaunchKernelEx", "cuda_driver", 5012.0, 2.0, 7),
            span("aten::mm", "cpu_op", 5011.0, 5.0),
            span("llama-fast op 1", "user_annotation", 5030.0, 10.0),
            span("cudaMemcpyAsync", "cuda_runtime", 5031.0, 2.0, 8),
            span("cudaLaunchKernel", "cuda_runtime", 5041.0, 2.0, 9),
            span("gemm", "kernel", 5040.0, 4.0, 7),
            span("Memcpy HtoD", "gpu_memcpy", 5045.0, 1.0, 8),
            span("outside", "kernel", 5050.0, 1.0, 9),
            span("cudaGraphLaunch", "cuda_runtime", 5100.0, 2.0, 20),
            span("b", "kernel", 5112.0, 1.0, 20),
            span("a", "kernel", 5110.0, 1.0, 20),
            span("cudaGraphLaunch", "cuda_runtime", 5103.0, 2.0, 21),
            span("a", "kernel", 5120.0, 1.0, 21),
        ],
        started=3.0,
    )
    assert [(event.name, event.op) for event in trace.launched] == [("gemm", 0), ("Memcpy HtoD", 1), ("outside", None)]
    assert trace.launched[0].start == pytest.approx(3.0 + 40e-6) and trace.launched[0].duration == pytest.approx(4e-6)
    assert [[event.name for event in graph] for graph in trace.graphs] == [["a", "b"], ["a"]]
    assert [event.name for event in trace.everything] == ["gemm", "Memcpy HtoD", "outside", "a", "b", "a"]


def test_a_launch_that_was_not_recorded_is_known_by_the_op_that_made_it():
    inside = span("llama_fast::linear", "cpu_op", 12.0, 5.0) | {"args": {"External id": 5}}
    kernel = span("gemm", "kernel", 20.0, 4.0) | {"args": {"External id": 5, "correlation": 7}}
    alone = span("fill", "kernel", 30.0, 4.0) | {"args": {"correlation": 8}}
    begin = span("llama-fast start", "user_annotation", 0.0, 1.0)
    trace = read_trace([begin, span("llama-fast op 3", "user_annotation", 10.0, 10.0), inside, kernel, alone], 0.0)
    assert [(event.name, event.op) for event in trace.launched] == [("gemm", 3), ("fill", None)]


def test_events_belong_to_the_token_that_they_end_before():
    generation = Generation(10.0, [1.0, 2.0, 3.0], [])
    found = by_token([Event("a", 10.1, 0.2), Event("b", 10.9, 0.2), Event("c", 12.5, 0.2), Event("d", 12.9, 0.2)],
                  generation)  # fmt: skip
    assert [[event.name for event in of] for of in found] == [["a"], ["b"], ["c"]]
