"""What a model is asked to do: texts to predict, and prompts to answer.

A task runs itself on an engine and gives `Answers`; `run.evaluate` makes scores of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..engine.llm import LLM
from ..engine.sampling import SamplingParams
from .perplexity import DEFAULT_WINDOWS, Progress, Windows, score_documents, xz_baselines
from .result import Baseline, Example, Score
from .scores import NAMES, Statistics, check_names, figures, measure

PROMPTS_AT_ONCE = 256


@dataclass(frozen=True)
class Answers:
    """What a task found, before it is summed up.

    Attributes:
        metrics: whose statistics each example has; the first has the headline.
        settings: how it was run.
        signatures: of the metrics that have one.
        baselines: what is no model.
        losses: of lm-eval's metrics those of which less is better.
        fixed: scores whose statistics are not known.
    """

    examples: list[Example]
    metrics: list[str]
    settings: dict[str, Any]
    signatures: dict[str, str] = field(default_factory=dict)
    baselines: list[Baseline] = field(default_factory=list)
    losses: frozenset[str] = frozenset()
    fixed: list[Score] = field(default_factory=list)


class Task(Protocol):
    """Anything with a name that can run on an engine."""

    @property
    def name(self) -> str: ...

    def run(self, llm: LLM, progress: Progress) -> Answers: ...


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """Predict documents: bits per byte, nats a token, perplexity.

    Args:
        name: of the task.
        documents: each a text of its own.
        windows: how they are cut.
        training: a text like those the model was trained on, for xz to know.
    """

    name: str
    documents: Sequence[str]
    windows: Windows = DEFAULT_WINDOWS
    training: str | None = None

    def run(self, llm: LLM, progress: Progress = lambda *_: None) -> Answers:
        window, stride = self.windows.of(llm)
        found = score_documents(llm, self.documents, self.windows, progress=progress)
        examples = [
            _example("", [passage.text], "", {"perplexity": passage.statistics})
            for passages in found
            for passage in passages
        ]
        settings = {"documents": len(self.documents), "window": window, "stride": stride}
        return Answers(examples, ["perplexity"], settings, baselines=xz_baselines(self.documents, self.training))


Checker = Callable[[str, str], bool]


@dataclass(frozen=True, kw_only=True)
class PromptTask:
    """Answer prompts, greedily.

    Args:
        name: of the task.
        prompts: what the model is given.
        references: for each prompt the outputs that are right, at least one.
        scores: names of metrics (`scores.NAMES`); the first is the headline.
        chat: each prompt is a user's message, put into the model's chat template.
        system: what the system says before it.
        max_tokens: of an output.
        stop: ends an output before the one of these strings that is complete first, beside the model's own end tokens.
        checker: says of (prompt, output) whether it is right; for "accuracy".

    Raises:
        ValueError: prompts and references do not pair up, or a score is unknown.
    """

    name: str
    prompts: Sequence[str]
    references: Sequence[Sequence[str]]
    scores: Sequence[str]
    chat: bool = False
    system: str | None = None
    max_tokens: int = 128
    stop: Sequence[str] = ()
    checker: Checker | None = None

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.references) or not all(self.references):
            raise ValueError(
                f"{self.name}: each of at least one prompt needs references, got {len(self.prompts)} prompts and "
                f"{sum(map(bool, self.references))} with references"
            )
        if not self.scores:
            raise ValueError(f"{self.name}: scores must name at least one of {', '.join(NAMES)}")
        check_names(self.scores)
        if ("accuracy" in self.scores) != (self.checker is not None):
            raise ValueError(f'{self.name}: the score "accuracy" needs a checker, and a checker needs it')

    def run(self, llm: LLM, progress: Progress = lambda *_: None) -> Answers:
        outputs = self._generate(llm, progress)
        measured = {
            name: (self._checked(outputs), "") if name == "accuracy" else measure(name, outputs, self.references)
            for name in self.scores
        }
        settings = {
            "chat": self.chat, "system": self.system, "max_tokens": self.max_tokens, "stop": list(self.stop), "temperature": 0,
        }  # fmt: skip
        return score_examples(self.prompts, outputs, self.references, measured, settings)

    def _generate(self, llm: LLM, progress: Progress) -> list[str]:
        """The outputs, without the spaces around them."""
        prompts = [self._tokens(llm, prompt) for prompt in self.prompts]
        for i, ids in enumerate(prompts):  # before the first is computed
            if len(ids) + self.max_tokens > llm.max_context:
                raise ValueError(
                    f"{self.name}: prompt {i} has {len(ids)} tokens, which with max_tokens={self.max_tokens} are more than the "
                    f"context of {llm.max_context}: leave it out, or lower max_tokens"
                )
        params = SamplingParams(temperature=0, max_tokens=self.max_tokens, stop=tuple(self.stop))
        outputs: list[str] = []
        for first in range(0, len(prompts), PROMPTS_AT_ONCE):
            progress(len(outputs), len(prompts))
            outputs += [done.text.strip() for done in llm.generate(prompts[first : first + PROMPTS_AT_ONCE], params)]
        progress(len(outputs), len(prompts))
        return outputs

    def _tokens(self, llm: LLM, prompt: str) -> list[int]:
        if not self.chat:
            return llm.tokenizer.encode(prompt)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return llm.tokenizer.chat([*system, {"role": "user", "content": prompt}])

    def _checked(self, outputs: Sequence[str]) -> Statistics:
        assert self.checker is not None
        return [[float(self.checker(prompt, output))] for prompt, output in zip(self.prompts, outputs, strict=True)]


def score_examples(
    prompts: Sequence[str], outputs: Sequence[str], references: Sequence[Sequence[str]],
    measured: Mapping[str, tuple[Statistics, str]], settings: dict[str, Any],
) -> Answers:  # fmt: skip
    """What was measured of some outputs, example by example."""
    examples = [
        _example(prompt, list(right), output, {name: statistics[i] for name, (statistics, _) in measured.items()})
        for i, (prompt, right, output) in enumerate(zip(prompts, references, outputs, strict=True))
    ]
    signatures = {name: signature for name, (_, signature) in measured.items() if signature}
    return Answers(examples, list(measured), settings, signatures)


def _example(prompt: str, references: list[str], output: str, statistics: dict[str, list[float]]) -> Example:
    alone = {figure.name: figure.alone(values) for metric, values in statistics.items() for figure in figures(metric)}
    return Example(prompt, references, output, statistics, alone)
