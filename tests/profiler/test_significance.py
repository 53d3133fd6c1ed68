"""The test of two series: what it must find, and what it must not."""

import math
import random

import pytest

from llama_fast.profiler.significance import difference


def series(n: int, *, seconds: float = 1e-3, noise: float, seed: int) -> list[float]:
    """Timings as machines give them: neighbours are alike, and some are interrupted."""
    chance = random.Random(seed)
    drift, samples = 0.0, []
    for _ in range(n):
        drift = 0.5 * drift + chance.gauss(0, noise / 2)
        late = chance.expovariate(2) if chance.random() < 0.03 else 0.0
        samples.append(seconds * math.exp(drift + chance.gauss(0, noise)) * (1 + late))
    return samples


@pytest.mark.parametrize(("n", "noise"), [(10, 0.005), (30, 0.02), (100, 0.05)])
def test_finds_a_planted_slow_down_among_many_comparisons(n: int, noise: float) -> None:
    for seed in range(10):
        before = series(n, noise=noise, seed=seed)
        found = difference(before, series(n, seconds=1.2e-3, noise=noise, seed=100 + seed), comparisons=100)
        assert found.is_slower and not found.is_faster
        assert found.low < 1.2 < found.high
        assert difference(series(n, seconds=1.2e-3, noise=noise, seed=200 + seed), before, comparisons=100).is_faster


@pytest.mark.parametrize(("n", "noise"), [(5, 0.01), (30, 0.02), (100, 0.05), (1000, 0.05)])
def test_silent_on_the_same(n: int, noise: float) -> None:
    alarms = [
        difference(series(n, noise=noise, seed=seed), series(n, noise=noise, seed=1000 + seed), comparisons=100)
        for seed in range(50)
    ]
    assert not any(alarm.is_significant for alarm in alarms)


@pytest.mark.parametrize(("n", "alike"), [(200, 0.9), (1000, 0.99)])
def test_false_alarms_are_rare_where_neighbours_are_much_alike(n: int, alike: float) -> None:
    """A CPU's clock and other processes: noise that stays for some hundred samples. 1 % is promised, a few are had, and 17 % without a correction."""
    alarms = 0
    chance = random.Random(0)
    for _ in range(150):
        pair = []
        for _ in range(2):
            state, samples = chance.gauss(0, 0.05), []
            for _ in range(n):
                state = alike * state + chance.gauss(0, 0.05 * math.sqrt(1 - alike**2))
                samples.append(math.exp(state + chance.gauss(0, 0.05)))
            pair.append(samples)
        alarms += difference(*pair, minimum=0.0).is_significant
    assert alarms <= 0.06 * 150


def test_a_sure_but_small_change_does_not_count() -> None:
    before, after = series(200, noise=0.005, seed=1), series(200, seconds=1.02e-3, noise=0.005, seed=2)
    assert not difference(before, after).is_significant
    assert difference(before, after, minimum=0.01).is_slower


def test_interval_is_students() -> None:
    """Without what is trimmed or cut into blocks (fewer than 5 samples), it is Welch's: computed by hand, t(0.02; 4) = 3.7469."""
    found = difference([1.0, 1.1, 1.21], [2.0, 2.2, 2.42], confidence=0.98)
    step = math.log(
        1.1
    )  # both series are geometric: variance step^2, squared error of the difference 2 * step^2 / 3, 4 degrees
    assert found.ratio == pytest.approx(2)
    assert math.log(found.high / found.ratio) == pytest.approx(3.7469 * step * math.sqrt(2 / 3), rel=1e-4)
    assert found.low * found.high == pytest.approx(found.ratio**2)


def test_few_samples() -> None:
    one = difference([1.0], [2.0])
    assert (one.ratio, one.low, one.high) == (2, 0, math.inf)
    assert not one.is_significant
    with pytest.raises(ValueError, match="each side needs a sample, got 0 and 1"):
        difference([], [1.0])


def test_outliers_do_not_hide_a_change() -> None:
    before = [1.0, 1.001, 0.999, 1.0, 1.002, 0.998, 1.001, 1.0, 0.999, 9.0]
    after = [1.2, 1.201, 1.199, 1.2, 1.202, 1.198, 1.201, 1.2, 1.199, 0.1]
    assert difference(before, after).is_slower
