"""Evaluations that nobody ran, for tests of what is made of them."""

from llama_fast.evaluate import scores
from llama_fast.evaluate.result import Evaluation, Example
from llama_fast.evaluate.run import summed_up
from llama_fast.evaluate.tasks import Answers

VERSIONS = {"python": "3.11", "sacrebleu": "2.6.0"}


def answers(outputs: list[str], metrics: list[str], *, right: str = "yes") -> Answers:
    """Of prompts "0", "1", ..., to all of which `right` is the answer."""
    references = [[right]] * len(outputs)
    measured = {metric: scores.measure(metric, outputs, references) for metric in metrics}
    examples = [
        Example(
            str(i), [right], output, {metric: measured[metric][0][i] for metric in metrics},
            {f.name: f.alone(measured[metric][0][i]) for metric in metrics for f in scores.figures(metric)},
        )
        for i, output in enumerate(outputs)
    ]  # fmt: skip
    return Answers(examples, metrics, {"stop": ["\n"]}, {metric: measured[metric][1] for metric in metrics})


def text_answers(nats: list[float]) -> Answers:
    """Of passages of ten bytes and two tokens."""
    examples = [
        Example("", [f"passage {i:02}"], "", {"perplexity": [each, 2.0, 10.0]}, {"bits per byte": each / 6.93})
        for i, each in enumerate(nats)
    ]
    return Answers(examples, ["perplexity"], {"window": 512})


def evaluation(**tasks: Answers) -> Evaluation:
    results = [summed_up(name, each, 1.0, seed=0, resamples=100) for name, each in tasks.items()]
    return Evaluation("model", "0" * 64, "cpu", "float32", results, 0, 100, VERSIONS, "llama-fast eval model")
