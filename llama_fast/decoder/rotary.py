"""Rotary position embeddings: how far each pair of a head's elements turns at each position.

    cos, sin = cos(position * inverse_frequency) * scaling, sin(position * inverse_frequency) * scaling

The types differ in the inverse frequencies alone. Two of them depend on how long the sequence is: `dynamic` (its base
grows beyond the trained length) and `longrope` (another set of factors beyond it). Each row counts its own sequence, so
what else is in a batch changes nothing. All is float32 in the order of operations of transformers, so that positions
in the thousands, where one rounding turns a head visibly, come out with the same bits (but `dynamic`, by its last ones).

Sources: Su et al. 2021 (arXiv:2104.09864); Chen et al. 2023, linear (arXiv:2306.15595); Peng et al. 2023, YaRN and
dynamic NTK (arXiv:2309.00071); Ding et al. 2024, LongRoPE (arXiv:2402.13753); Llama 3.1.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

from ..kernels.rotary_angles import rotary_angles
from .config import DecoderConfig, RopeConfig


def inverse_frequencies(
    rope: RopeConfig, rotary_dim: int, max_positions: int, length: int | None = None
) -> tuple[Tensor, float]:
    """The angles of one step of position, (rotary_dim / 2,) float32 on the CPU, and the factor of cosines and sines.

    `length` is that of the sequence, None for any up to the trained one; only `dynamic` and `longrope` look at it.
    """
    if rope.rope_type == "dynamic":
        base = _dynamic_base(rope, rotary_dim, max_positions, float(max(length or 0, max_positions)))
        return 1.0 / base ** _exponents(rotary_dim), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, rotary_dim, max_positions)
    if rope.rope_type == "longrope":
        return _longrope(rope, rotary_dim, max_positions, length)
    plain = 1.0 / rope.theta ** _exponents(rotary_dim)
    if rope.rope_type == "linear":
        return plain / rope.parameters["factor"], 1.0
    return (_llama3(rope, plain) if rope.rope_type == "llama3" else plain), 1.0


class RotaryTable:
    """The cosines and sines of a decoder's tokens, computed as they are asked for.

    Nothing is stored by position (a table for 128k positions would take 64 MB), so there is no longest position.
    `recompute_after`: past this length every key turns otherwise (`longrope`), so the keys a sequence has cached when it
    grows past it must be computed again, as transformers does; None where no such length is.
    """

    def __init__(self, config: DecoderConfig, device: torch.device | str | None = None) -> None:
        self._config = config
        rope, sizes = config.rope, (config.rotary_dim, config.max_positions)
        frequencies, self._scaling = inverse_frequencies(rope, *sizes)
        self._frequencies = _both_halves(frequencies).to(device)
        self._exponents = _exponents(config.rotary_dim).to(device)
        self.recompute_after: int | None = None
        self._long: Tensor | None = None
        if rope.rope_type == "longrope":
            trained = self.recompute_after = int(rope.parameters["original_max_position_embeddings"])
            self._long = _both_halves(inverse_frequencies(rope, *sizes, trained + 1)[0]).to(device)

    def rows(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin (tokens, rotary_dim) float32, the second half a repetition of the first.

        `positions` (tokens,) int64 count from 0 in each token's own sequence; `lengths` (tokens,) int64 are how long that
        sequence is: all of the prompt while it is read, in however many chunks, and then all there is. Reads nothing back
        to the host, so a CUDA graph may hold it.
        """
        if self._config.rope.rope_type != "dynamic":
            return rotary_angles(
                positions,
                lengths,
                self._frequencies,
                long=self._long,
                limit=self.recompute_after or 0,
                scaling=self._scaling,
            )
        angles = positions[:, None].float() * self._dynamic(lengths[:, None])
        return angles.cos(), angles.sin()

    def _dynamic(self, lengths: Tensor) -> Tensor:
        """(tokens, rotary_dim): where a sequence's length changes every frequency."""
        trained = self._config.max_positions
        # in float64: PyTorch's float32 pow differs in its last bit with the place of a row among others
        stretched = lengths.clamp(min=trained).double()
        base = _dynamic_base(self._config.rope, self._config.rotary_dim, trained, stretched).float()
        return _both_halves(1.0 / base**self._exponents)


def _both_halves(x: Tensor) -> Tensor:
    return torch.cat((x, x), dim=-1)


def _exponents(rotary_dim: int) -> Tensor:
    return torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim


_Length = TypeVar("_Length", float, Tensor)


def _dynamic_base(rope: RopeConfig, rotary_dim: int, trained: int, length: _Length) -> _Length:
    """The base for a sequence of `length`, at least the trained one: the slowest pair turns the slower the longer it is."""
    factor: float = rope.parameters["factor"]
    base: _Length = rope.theta * ((factor * length / trained) - (factor - 1)) ** (rotary_dim / (rotary_dim - 2))
    return base


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Slow pairs turn `factor` times slower, fast ones as they did, those between by a blend of both."""
    parameters = rope.parameters
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = parameters["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    slowed = torch.where(wavelength > trained / low, plain / factor, plain)
    share = (trained / wavelength - low) / (high - low)
    blend = (1 - share) * slowed / factor + share * slowed
    between = (wavelength >= trained / high) & (wavelength <= trained / low)
    return torch.where(between, blend, slowed)


def _yarn(rope: RopeConfig, rotary_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Pairs with more than `beta_fast` turns in the trained length keep their pace, those with under `beta_slow` slow down."""
    parameters = rope.parameters
    trained = parameters["original_max_position_embeddings"]
    factor = max_positions / trained if parameters.get("factor") is None else parameters["factor"]

    def pair_with(turns: float) -> float:
        return (rotary_dim * math.log(trained / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))

    first, last = pair_with(parameters.get("beta_fast") or 32), pair_with(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    ramp = (torch.arange(rotary_dim // 2, dtype=torch.float32, device="cpu") - first) / ((last - first) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    wavelengths = rope.theta ** _exponents(rotary_dim)
    frequencies = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return frequencies, _yarn_scaling(rope, factor)


def _yarn_scaling(rope: RopeConfig, factor: float) -> float:
    """How much longer queries and keys are, which sharpens the attention over more keys."""

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    given, mscale, all_dims = (rope.parameters.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    return scale(mscale) / scale(all_dims) if mscale and all_dims else scale(1.0)


def _longrope(rope: RopeConfig, rotary_dim: int, max_positions: int, length: int | None) -> tuple[Tensor, float]:
    """Each pair has its own factor; there is one set for sequences of the trained length and one for longer ones."""
    parameters = rope.parameters
    trained, scaling = parameters["original_max_position_embeddings"], parameters.get("attention_factor")
    factor = max_positions / trained if parameters.get("factor") is None else parameters["factor"]
    if scaling is None:
        scaling = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(trained))
    chosen = parameters["long_factor" if length is not None and length > trained else "short_factor"]
    factors = torch.tensor(chosen, dtype=torch.float32, device="cpu")
    return 1.0 / (factors * rope.theta ** _exponents(rotary_dim)), float(scaling)
