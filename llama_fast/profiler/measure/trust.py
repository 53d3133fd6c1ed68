"""Why a profile may be believed: right numbers, the same numbers again, a warm machine whose clocks stood still."""

import copy
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...engine.memory import available_bytes
from ...kernels.parity import error_bound, relative_error
from ..result import Trust
from . import sides
from .latency import Rounds
from .sides import TRANSFORMERS, Side
from .subject import Subject, first_line, transformers_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECKED = 64  # tokens whose logits are compared: in float64 on a CPU, 1B parameters take 10 s for them
_WARM = 0.05
_SPREAD = 0.1
_NO_THROTTLING = 0x3  # the bits of nvidia-smi's reasons that say idle, and clocks set by an application


def trust(
    subject: Subject, rounds: Sequence[Rounds], prompts: Tensor, *, before: dict[str, str], after: dict[str, str], command: str
) -> Trust:  # fmt: skip
    """The evidence, from the timed rounds of the first setting and from a comparison of logits."""
    ours = rounds[0]
    warnings = [*subject.warnings, *unsteady(rounds, before, after)]
    generated = ours.generations[0].token_ids
    if any(generation.token_ids != generated for generation in ours.generations):
        warnings.append(f"{ours.side.name}: two rounds gave different tokens")
    ids = torch.cat([prompts[0], torch.tensor(generated[0], device=prompts.device)])[-_CHECKED:]
    logits = ours.side.logits(ids)
    same_bits = torch.equal(logits, ours.side.logits(ids))
    errors: dict[str, float] = {}
    largest: dict[str, float] = {}
    passed, common = None, None
    try:
        peer = _peer(subject, warnings)
        if peer is not None:
            expected = logits_in_float64(peer.model, ids)
            for side in _unlike([*subject.sides, peer]):
                found = side.logits(ids).to(expected.device)
                errors[side.name] = relative_error(found, expected)
                largest[side.name] = (found.double() - expected).abs().max().item()
            passed = errors[ours.side.name] <= error_bound(errors[peer.name], subject.dtype)
            common = _common_tokens(rounds, peer, prompts, generated)
    except RuntimeError as error:  # memory, a kernel: what was measured until here is worth as much without
        warnings.append(f"logits were not compared: {first_line(error)}")
    if passed is False:
        warnings.append(
            f"{ours.side.name}: its logits are further from float64 than the rule beside {TRANSFORMERS} allows"
        )
    return Trust(
        errors, largest, passed, common, len(generated[0]), same_bits, is_warm(ours), before, after, _memory(subject), command,
        warnings,
    )  # fmt: skip


def _unlike(found: Sequence[Side]) -> list[Side]:
    """One side of each name."""
    return list({side.name: side for side in found}.values())


def _peer(subject: Subject, warnings: list[str]) -> "sides.TransformersSide | None":
    """transformers' own layers; None, and a warning, where they cannot be had."""
    if subject.llm is not None and subject.theirs is None:
        needed = 1.5 * subject.llm.ledger.weights
        if available_bytes(subject.device) < needed:
            warnings.append("logits were not compared: there is no memory for transformers' copy of the model")
            return None
    try:
        return sides.plain_side(transformers_model(subject)[0])
    except (ImportError, OSError, ValueError) as error:
        warnings.append(f"logits were not compared: transformers has no model to compare with: {error}")
        return None


def _common_tokens(rounds: Sequence[Rounds], peer: Side, prompts: Tensor, generated: list[list[int]]) -> int:
    """How many tokens all rows have in common with transformers' greedy ones."""
    theirs = next((each.generations[0].token_ids for each in rounds if each.side.name == peer.name), None)
    if theirs is None:
        theirs = peer.generate(prompts, len(generated[0])).token_ids
    return min(_common_prefix(a, b) for a, b in zip(generated, theirs, strict=True))


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def logits_in_float64(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    """(tokens, vocab) of transformers' model in float64 throughout. The weights of one layer are in float64 at a time."""
    from ...fusion.verify import InFloat64

    large = {id(x): x for block in _blocks(model) for x in (*block.parameters(), *block.buffers())}
    reference: Any = copy.deepcopy(model, memo=dict(large))
    for tensor in (*reference.parameters(), *reference.buffers()):  # norms, angles: what is in no block
        if id(tensor) not in large and tensor.is_floating_point():
            tensor.data = tensor.data.double()
    for block in _blocks(reference):
        block.forward = _InDouble(block)
    with torch.inference_mode(), InFloat64():
        logits: Tensor = reference(ids.to(model.device)[None], use_cache=False).logits[0]
    return logits


class _InDouble:
    """The forward pass of a block on a copy in float64, which is dropped after it."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self._block.__dict__.pop("forward")  # the copy is to have its class's again
        doubled = copy.deepcopy(self._block).double()
        self._block.forward = own
        return doubled(*args, **kwargs)


def _blocks(model: Any) -> list[Any]:
    """Where nearly all weights are."""
    from ...fusion.neighbours import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [block for block in (*ends, *layers) if block is not None]


def is_warm(rounds: Rounds) -> bool:
    """Whether the first and the last quarter of all rounds' tokens agree, each place in its round against the same place in others."""
    by_round = [[b - a for a, b in pairwise(generation.times)] for generation in rounds.generations]
    quarter = max(1, len(by_round) // 4)
    first, last = (
        statistics.median(gap for gaps in part for gap in gaps) for part in (by_round[:quarter], by_round[-quarter:])
    )
    return abs(first - last) <= _WARM * first


def unsteady(rounds: Sequence[Rounds], before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What a reader must know of the machine: spread, drift, clocks, throttling."""
    warnings = [
        f"{each.side.name}: the time from token to token spreads by {spread:.0%} from p20 to p80"
        for each in rounds
        if (spread := each.latency(1).itl.spread) > _SPREAD
    ]
    warnings += [
        f"{each.side.name}: the last rounds differ from the first: not warm" for each in rounds if not is_warm(each)
    ]
    for name in ("clocks.sm", "clocks.mem"):
        if before.get(name) != after.get(name):
            warnings.append(f"{name} moved from {before.get(name)} to {after.get(name)}")
    reasons = after.get("clocks_throttle_reasons.active", "")
    if reasons.startswith("0x") and int(reasons, 16) & ~_NO_THROTTLING:
        warnings.append(f"the GPU throttled: reasons {reasons}")
    return warnings


def _memory(subject: Subject) -> dict[str, int]:
    """What the engine's ledger says, or the weights of transformers' model.

    On a GPU also the most that was ever allocated, for all sides and the float64 reference together.
    """
    found: dict[str, int] = {}
    if subject.llm is not None:
        found |= asdict(subject.llm.ledger)
    elif subject.theirs is not None:
        found["weights"] = sum(x.numel() * x.element_size() for x in subject.theirs.parameters())
    if subject.device.type == "cuda":
        found["process_peak"] = torch.cuda.max_memory_allocated(subject.device)
    return found
