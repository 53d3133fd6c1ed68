"""A waterfall's parts sum to its latency, whatever was measured apart from it."""

import pytest

from llama_fast.profiler.attribute.kernels import NOT_ATTRIBUTED
from llama_fast.profiler.attribute.waterfall import NEEDLESS, gpu_first_token, gpu_token, host_waterfall
from llama_fast.profiler.measure.phases import AFTER, phases_of_tokens, typical
from llama_fast.profiler.measure.sides import Generation
from llama_fast.profiler.result import KINDS, Kernel, Waterfall


def kernel(where: str, seconds: float, floor: float) -> Kernel:
    return Kernel("k", where, 1, seconds, 0, 0, 0, floor)


KERNELS = [
    kernel("attention", 40.0, 30.0),
    kernel("mlp.down", 20.0, 25.0),
    kernel("mlp.down", 10.0, 5.0),
    kernel("sampling", 7.0, 1.0),
    kernel("inputs", 2.0, 0.0),
]
PHASES = {"schedule": 3.0, "inputs": 4.0, "forward": 90.0, "sample": 8.0, "read": 1.0, "text": 2.0, AFTER: 1.0}


def seconds(waterfall: Waterfall) -> dict[str, float]:
    return {part.name: part.seconds for part in waterfall.parts}


def check(waterfall: Waterfall) -> None:
    assert sum(part.seconds for part in waterfall.parts) == pytest.approx(waterfall.measured, rel=1e-12)
    assert waterfall.parts[-1].name == "rest"
    assert all(part.seconds > 0 for part in waterfall.parts[:-1])
    kinds = [KINDS.index(part.kind) for part in waterfall.parts]
    assert kinds == sorted(kinds)


def test_a_step_on_a_cpu_is_its_phases_and_its_forward_pass_taken_apart():
    waterfall = host_waterfall(109.0, PHASES, KERNELS)
    check(waterfall)
    found = seconds(waterfall)
    assert found["floor"] == 30 + 20 + 5  # nothing's floor counts for more than it took
    assert (found["attention"], found["mlp.down"]) == (10, 5)
    assert found["between operators"] == 90 - 70
    assert (found["sampling"], found["read back"], found["detokenise"]) == (8, 1, 2)
    assert found["rest"] == pytest.approx(0)


def test_what_is_measured_apart_and_does_not_fit_is_a_negative_rest():
    waterfall = host_waterfall(109.0, PHASES | {"forward": 60.0}, KERNELS)
    check(waterfall)
    assert "between operators" not in seconds(waterfall)
    assert seconds(waterfall)["rest"] == pytest.approx(109 - (70 + 19))


def test_operators_have_no_more_between_them_than_was_seen():
    waterfall = host_waterfall(109.0, PHASES, KERNELS, gaps=5.0)
    check(waterfall)
    assert (seconds(waterfall)["between operators"], seconds(waterfall)["rest"]) == (5, pytest.approx(15))


def test_a_side_that_names_no_forward_pass_is_a_step():
    waterfall = host_waterfall(50.0, {"step": 49.0, AFTER: 1.0}, [])
    check(waterfall)
    assert seconds(waterfall)["step"] == 49


def test_a_step_on_a_gpu_is_the_device_s_period():
    waterfall = gpu_token(120.0, KERNELS, gaps=30.0, copies=3.0, span=100.0, phases=PHASES | {"wait": 50.0})
    check(waterfall)
    found = seconds(waterfall)
    assert found["gaps between kernels"] == 100 - 79  # a tracer's longer gaps do not count
    assert found["GPU idle between steps"] == 120 - 100 - 3
    assert (found["sampling"], found["inputs"], found["copies"]) == (7, 2, 3)
    assert found["rest"] == pytest.approx(0)
    hidden = {part.name for part in waterfall.hidden}
    assert "detokenise" in hidden and "wait for the GPU" not in hidden


@pytest.mark.parametrize("measured", [60.0, 79.0, 100.0, 300.0])
@pytest.mark.parametrize("span", [0.0, 70.0, 90.0])
@pytest.mark.parametrize("gaps", [0.0, 15.0, 500.0])
def test_a_gpu_s_parts_always_sum_and_are_never_negative(measured, span, gaps):
    check(gpu_token(measured, KERNELS, gaps=gaps, copies=1.0, span=span, phases=PHASES))
    check(gpu_first_token(measured, KERNELS, gaps=gaps, until_first=span, phases=PHASES | {"tokenise": 5.0}))


def test_the_first_token_on_a_gpu():
    phases = PHASES | {"tokenise": 5.0, "submit": 4.0}
    waterfall = gpu_first_token(150.0, KERNELS, gaps=12.0, until_first=24.0, phases=phases)
    check(waterfall)
    found = seconds(waterfall)
    assert (found["tokenise"], found["queue the request"], found["until the first launch"]) == (5, 4, 20)
    assert found["gaps between kernels"] == 12
    assert found["rest"] == pytest.approx(150 - 79 - 5 - 4 - 20 - 12 - 1 - 2 - 1)


def test_kernels_of_a_compiled_model_have_the_step_s_floor():
    compiled = [kernel(NOT_ATTRIBUTED, 60.0, 0.0), kernel(NOT_ATTRIBUTED, 20.0, 0.0)]
    waterfall = gpu_token(100.0, compiled, gaps=5.0, phases={"step": 100.0}, least=50.0)
    check(waterfall)
    assert (seconds(waterfall)["floor"], seconds(waterfall)[NOT_ATTRIBUTED]) == (50, 30)


def test_a_few_kernels_that_are_not_attributed_do_not_get_the_whole_step_s_floor():
    few = [*KERNELS, kernel(NOT_ATTRIBUTED, 10.0, 0.0)]
    found = seconds(gpu_token(120.0, few, gaps=5.0, phases={}, least=58.0))
    assert found["floor"] == 58 and found[NOT_ATTRIBUTED] == 10 - 3  # the others' floors are 55
    found = seconds(gpu_token(120.0, few, gaps=5.0, phases={}, least=40.0))
    assert found[NOT_ATTRIBUTED] == 10


def test_what_kernels_move_beyond_what_the_model_asks_for_is_no_floor():
    for waterfall in (
        gpu_token(120.0, KERNELS, gaps=5.0, phases={}, least=40.0),
        gpu_first_token(120.0, KERNELS, gaps=5.0, until_first=1.0, phases={}, least=40.0),
        host_waterfall(109.0, PHASES, KERNELS, least=40.0),
    ):
        check(waterfall)
        found = seconds(waterfall)
        assert (found["floor"], found[NEEDLESS]) == (40, 15)
        assert (found["attention"], found["mlp.down"]) == (10, 5)
    assert seconds(gpu_token(120.0, KERNELS, gaps=5.0, phases={}, least=60.0))["floor"] == 55


def test_the_gpu_is_not_said_to_idle_longer_than_it_was_seen_to():
    """Else the parts would fill any latency, and the rest could show nothing."""
    waterfall = gpu_token(120.0, KERNELS, gaps=10.0, copies=1.0, span=85.0, between=14.0, phases={})
    check(waterfall)
    found = seconds(waterfall)
    assert (found["gaps between kernels"], found["GPU idle between steps"]) == (6, 14)
    assert found["rest"] == pytest.approx(120 - 1 - 85 - 14)


def test_phases_fill_the_time_between_tokens():
    generation = Generation(100.0, [10.0, 14.0, 20.0], [])
    marks = [
        ("submit", 101.0),
        ("forward", 108.0),
        ("text", 109.5),
        ("forward", 113.0),
        ("forward", 118.0),
        ("x", 130.0),
    ]
    first, second, third = phases_of_tokens(marks, generation)
    assert first == {"submit": 1.0, "forward": 7.0, "text": 1.5, AFTER: 0.5}
    assert second == {"forward": 3.0, AFTER: 1.0}
    assert third == {"forward": 4.0, AFTER: 2.0}


def test_a_typical_step_sums_to_the_median():
    samples = [(float(i), {"a": i - 1.0, "b": 1.0}) for i in (3, 9, 4, 100, 5)]
    assert typical(samples) == {"a": 4.0, "b": 1.0}
