"""lm-eval's tasks on our engine.

    import lm_eval
    lm_eval.simple_evaluate(model=HarnessLM(LLM("folder")), tasks=["..."], ...)

Every request has exactly one BOS if the model uses one (lm-eval's `hf` puts a second before rolling windows of such a model, and scores it).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from numbers import Real
from pathlib import Path
from typing import Any

from ..engine.llm import LLM
from ..engine.sampling import SamplingParams
from .extra import needed_extra
from .likelihood import likelihoods
from .perplexity import Progress
from .result import Example, Score
from .scores import FROM_HARNESS, figures
from .tasks import PROMPTS_AT_ONCE, Answers

with needed_extra():
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class HarnessLM(TemplateLM):
    """A model for lm-eval, batched by our engine.

    `max_length` is one less than the context: lm-eval counts what a model reads, and the last token of a continuation is judged only.
    """

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm
        self.max_length = llm.max_context - 1
        self.max_gen_toks = 256
        self._device = llm.device

    @property
    def eot_token_id(self) -> int:
        return self.llm.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        start = self.llm.tokenizer.start_id
        if start is None:
            raise ValueError(
                "the model's tokenizer names neither a BOS nor an end token to put before an empty context"
            )
        return start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        return self.llm.tokenizer.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise ValueError(f"a continuation of {longest} tokens is longer than the context of {self.llm.max_context}")
        sequences = (
            ((context + continuation)[-self.llm.max_context :], len(continuation))
            for _, context, continuation in requests
        )
        found = []
        for (key, _, _), likelihood in zip(requests, likelihoods(self.llm, sequences), strict=True):
            answer = (sum(likelihood.logprobs), likelihood.is_greedy)
            found.append(answer)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [list(self._rolling(request.args[0])) for request in requests]
        scored = iter(self._loglikelihood_tokens([(None, *pair) for pair in chain.from_iterable(windows)]))
        totals = [sum(logprob for logprob, _ in islice(scored, len(each))) for each in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _rolling(self, text: str) -> Iterable[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        tokens = tokens[1:] if tokens[:1] == [self.prefix_token_id] else tokens  # it comes before them anyway
        pairs = get_rolling_token_windows(
            token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        return map(make_disjoint_window, pairs)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        outputs: list[str] = []
        for first in range(0, len(requests), PROMPTS_AT_ONCE):
            some = requests[first : first + PROMPTS_AT_ONCE]
            prompts = [self._prompt(*request.args) for request in some]
            done = self.llm.generate([ids for ids, _ in prompts], [params for _, params in prompts])
            for request, completion in zip(some, done, strict=True):
                outputs.append(completion.text)
                self.cache_hook.add_partial("generate_until", request.args, completion.text)
        return outputs

    def _prompt(self, context: str, asked: dict[str, Any]) -> tuple[list[int], SamplingParams]:
        """A context's tokens, cut on the left where no room is left for the output, and how to sample."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        most = options["max_gen_toks"]
        room = self.llm.max_context - most
        if room < 1:
            raise ValueError(f"max_gen_toks must be less than the context, {self.llm.max_context}, got {most}")
        sampling = {name: options[name] for name in _SAMPLING if name in options}
        stop = tuple(text for text in options.get("until", ()) if text)
        temperature = options["temperature"] if options.get("do_sample") else 0.0
        return self.tok_encode(context)[-room:], SamplingParams(
            temperature=temperature, max_tokens=most, stop=stop, **sampling
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.llm.tokenizer.render_chat(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return f"the chat template of {self.tokenizer_name}" if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return str(self.llm.tokenizer.folder)


# --- as tasks of our own ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-eval. The figures are lm-eval's; those made of a statistic of each example get an interval beside them."""

    name: str
    task: Any
    manager: TaskManager
    limit: int | None
    chat: bool
    seed: int

    def run(self, llm: LLM, progress: Progress = lambda *_: None) -> Answers:
        found = simple_evaluate(
            model=HarnessLM(llm), tasks=[self.task], task_manager=self.manager, limit=self.limit, bootstrap_iters=0,
            apply_chat_template=self.chat, random_seed=self.seed, numpy_random_seed=self.seed, torch_random_seed=self.seed,
            fewshot_random_seed=self.seed,
        )  # fmt: skip
        higher_is_better = found["higher_is_better"][self.name]
        results = dict(_figures(found["results"][self.name]))
        losses = frozenset(key for key in results if higher_is_better.get(_metric(key)) is False)
        metrics: list[str] = []
        fixed: list[Score] = []
        examples = _examples(found["samples"][self.name], self.task.OUTPUT_TYPE)
        for metric, value in results.items():
            if _is_resampled(metric, value, examples):
                metrics.append(metric)
            else:
                (figure,) = figures(metric)
                fixed.append(Score(figure.name, metric, value, None, None, figure.unit, metric in losses, ""))
        version = found["versions"][self.name]
        settings = {
            "chat": self.chat,
            "num_fewshot": self.task.config.num_fewshot,
            "version": version if isinstance(version, int | float) else None,  # "Yaml" where a file gives none
        }
        return Answers(
            [_with_scores(example, metrics) for example in examples], metrics, settings, losses=losses, fixed=fixed
        )


def load_tasks(
    names: Sequence[str], *, limit: int | None = None, chat: bool = False, seed: int = 0
) -> list[HarnessTask]:
    """Tasks by lm-eval's names, groups by their tasks, and those that .yaml files describe.

    With files alone nothing else is looked for, and `dataset_path: json` needs no network.

    Args:
        names: of tasks and files.
        limit: examples of a task at most.
        chat: put what is asked into the model's chat template.
        seed: of whatever a task draws.

    Raises:
        ValueError: there is no such task.
    """
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    if missing := [name for name in files if not Path(name).is_file()]:
        raise ValueError(f"there is no file {missing[0]}")
    manager = TaskManager(include_defaults=len(files) < len(names))
    try:
        loaded = manager.load(list(names))["tasks"]
    except KeyError as error:
        raise ValueError(f"lm-eval: {error.args[0]}") from None
    return [HarnessTask(name, task, manager, limit, chat, seed) for name, task in loaded.items()]


def _figures(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Metrics and values. lm-eval keys them by "metric,filter"; "none" is the filter of most tasks."""
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield _key(metric, kind), float(value)


def _key(metric: str, kind: str) -> str:
    return FROM_HARNESS + (metric if kind == "none" else f"{metric},{kind}")


def _metric(key: str) -> str:
    return key.removeprefix(FROM_HARNESS).partition(",")[0]


def _examples(samples: Sequence[Mapping[str, Any]], output_type: str) -> list[Example]:
    """One for each document; a task with several filters has several samples of each."""
    found: dict[int, Example] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        statistics = {
            _key(metric, sample["filter"]): numbers
            for metric in sample["metrics"]
            if (numbers := _numbers(sample[metric]))
        }
        there = found.setdefault(sample["doc_id"], Example(*_shown(sample, output_type), {}, {}))
        there.statistics.update(statistics)
    return list(found.values())


def _numbers(value: Any) -> list[float]:
    """What lm-eval has measured of a sample, as statistics; none where it is something else, such as texts."""
    several = list(value) if isinstance(value, list | tuple) else [value]
    return [float(x) for x in several] if all(isinstance(x, Real) for x in several) else []


def _shown(sample: Mapping[str, Any], output_type: str) -> tuple[str, list[str], str]:
    """Prompt, references and output of a sample: of a choice, the continuations that are right and that is likeliest."""
    asked, answers, target = sample["arguments"], sample["filtered_resps"], sample["target"]
    if output_type == "loglikelihood_rolling":
        return "", [asked[0][0]], ""
    prompt = str(asked[0][0])
    if output_type == "generate_until":
        return prompt, [str(each) for each in (target if isinstance(target, list) else [target])], str(answers[0])
    likeliest = max(range(len(asked)), key=lambda i: answers[i][0])
    is_index = isinstance(target, int) and 0 <= target < len(asked)
    return prompt, [asked[target][1] if is_index else str(target)], asked[likeliest][1]


def _is_resampled(metric: str, value: float, examples: Sequence[Example]) -> bool:
    """Whether the statistics of the examples give the value that lm-eval has computed."""
    statistics = [example.statistics.get(metric, []) for example in examples]
    (figure,) = figures(metric)
    if not all(statistics) or len({len(each) for each in statistics}) > 1:
        return False
    ours = figure.of([sum(column) for column in zip(*statistics, strict=True)], len(examples))
    return math.isclose(ours, value, rel_tol=1e-9, abs_tol=1e-12)


def _with_scores(example: Example, metrics: Sequence[str]) -> Example:
    statistics = {metric: example.statistics[metric] for metric in metrics}
    alone = {figure.name: figure.alone(statistics[metric]) for metric in metrics for figure in figures(metric)}
    return replace(example, statistics=statistics, scores=alone)
