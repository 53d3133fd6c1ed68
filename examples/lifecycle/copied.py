"""What copying the source scores as a translation: the same lines that `after` was judged by, as copied/evaluation.json."""

from pathlib import Path

from llama_fast.environment import versions
from llama_fast.evaluate.files import read_lines
from llama_fast.evaluate.result import Evaluation, Example
from llama_fast.evaluate.run import summed_up
from llama_fast.evaluate.scores import measure
from llama_fast.evaluate.tasks import Answers
from llama_fast.reports.jsonfile import read_json, write_json

METRICS = ["bleu", "chrf", "exact_match"]


def main() -> None:
    after = read_json("after/evaluation.json", Evaluation)
    task = next(task for task in after.tasks if task.name == "translation")
    sources = [line["source"] for _, line in read_lines(Path("translation.jsonl"), len(task.examples))]
    found = {name: measure(name, sources, [each.references for each in task.examples]) for name in METRICS}
    examples = [
        Example(each.prompt, each.references, source, {name: found[name][0][i] for name in METRICS}, {})
        for i, (each, source) in enumerate(zip(task.examples, sources, strict=True))
    ]
    signatures = {name: signature for name, (_, signature) in found.items() if signature}
    result = summed_up(
        task.name, Answers(examples, METRICS, {}, signatures), 0.0, seed=after.seed, resamples=after.resamples
    )
    Path("copied").mkdir(exist_ok=True)
    copied = Evaluation("the source", "", "", "", [result], after.seed, after.resamples, versions(), "")
    write_json("copied/evaluation.json", copied)
    for score in result.scores:
        print(f"{score.name} of the source itself: {score.value:.3g}")


if __name__ == "__main__":
    main()
