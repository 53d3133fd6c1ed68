"""What copying the source scores as a translation: the same lines that `after` and `adapted` were judged by, as copied/evaluation.json."""

from pathlib import Path

from llama_fast.environment import versions
from llama_fast.evaluate.files import read_lines
from llama_fast.evaluate.result import Evaluation, Example, TaskResult
from llama_fast.evaluate.run import summed_up
from llama_fast.evaluate.scores import measure
from llama_fast.evaluate.tasks import Answers
from llama_fast.reports.jsonfile import read_json, write_json

METRICS = ["bleu", "chrf", "exact_match"]
COPIED = {"translation": ("after", "source"), "reversed": ("adapted", "target")}
"""By task, the evaluation whose lines are copied, and the field that a copy has."""


def main() -> None:
    results = [
        copies(task, read_json(f"{which}/evaluation.json", Evaluation), field)
        for task, (which, field) in COPIED.items()
    ]
    Path("copied").mkdir(exist_ok=True)
    like = read_json("after/evaluation.json", Evaluation)
    copied = Evaluation("the source", "", "", "", results, like.seed, like.resamples, versions(), "")
    write_json("copied/evaluation.json", copied)
    for result in results:
        for score in result.scores:
            print(f"{result.name}: {score.name} of the source itself: {score.value:.3g}")


def copies(name: str, judged: Evaluation, field: str) -> TaskResult:
    task = next(task for task in judged.tasks if task.name == name)
    outputs = [line[field] for _, line in read_lines(Path(f"{name}.jsonl"), len(task.examples))]
    found = {metric: measure(metric, outputs, [each.references for each in task.examples]) for metric in METRICS}
    examples = [
        Example(each.prompt, each.references, output, {metric: found[metric][0][i] for metric in METRICS}, {})
        for i, (each, output) in enumerate(zip(task.examples, outputs, strict=True))
    ]
    signatures = {metric: signature for metric, (_, signature) in found.items() if signature}
    return summed_up(
        name, Answers(examples, METRICS, {}, signatures), 0.0, seed=judged.seed, resamples=judged.resamples
    )


if __name__ == "__main__":
    main()
