"""All that the stages have found, as lifecycle.json, and as one page that is made of it: report.html.

    python report.py lifecycle.html.jinja [--quick]

Ends with status 1 where a bar was missed; of a quick run the only one is that bits per byte fell.
"""

import argparse
import csv
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from llama_fast.environment import default_device
from llama_fast.evaluate.compare import compare
from llama_fast.evaluate.result import Evaluation, TaskResult
from llama_fast.profiler.machine import machine
from llama_fast.reports import units
from llama_fast.reports.jsonfile import read_json, write_whole
from llama_fast.reports.pages import templates
from llama_fast.train.report.curves import curve

POINTS = 200
"""Of a curve; each is the mean of several steps."""
RUNS = {"pretrain": "Pre-training", "tune": "Fine-tuning", "adapter": "The adapter (LoRA)"}
EVALUATIONS = ("before", "after", "unadapted", "adapted", "copied")
PAIRS = [
    ("before", "after"),
    ("copied", "after"),
    ("unadapted", "adapted"),
    ("copied", "adapted"),
    ("after", "adapted"),
]
"""Which are compared."""
TASKS = {
    "modern": "held-out plays, modern", "folio": "held-out plays, 1623", "stories": "held-out stories",
    "translation": "lines of 1623, spelt as today", "reversed": "lines of today, spelt as in 1623", "questions": "questions about stories", "summaries": "summaries of stories",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Write lifecycle.json and report.html here.")
    parser.add_argument("template", type=Path)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    result = collected(quick=asked.quick)
    write_whole(Path("lifecycle.json"), json.dumps(result, indent=1, ensure_ascii=False))
    write_whole(Path("report.html"), page(result, asked.template))
    for bar in result["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['kind']:<4} {bar['what']}: {bar['found']}")
    print("report.html written")
    return int(any(bar["kind"] == "bar" and not bar["met"] for bar in result["bars"]))


# --- what was found --------------------------------------------------------------------------------------------------


def collected(*, quick: bool) -> dict[str, Any]:
    evaluations = {name: read_json(f"{name}/evaluation.json", Evaluation) for name in EVALUATIONS}
    found: dict[str, Any] = {
        "quick": quick,
        "machine": machine(default_device()),
        "stages": [read("stamps", name) | {"name": name} for name in stage_names()],
        "data": data(),
        "planted": read("planted"),
        "runs": {name: training(Path(name)) for name in RUNS},
        "scores": list(scores(evaluations)),
        "changes": changes(evaluations),
        "examples": {task.name: shown(task) for task in evaluations["after"].tasks if task.examples[0].prompt},
        "use": read("use"),
    }
    found["bars"] = [dict(zip(("kind", "what", "found", "met"), bar, strict=True)) for bar in bars(found, quick=quick)]
    return found


def read(*path: str) -> Any:
    return json.loads(Path(*path[:-1], f"{path[-1]}.json").read_text(encoding="utf-8"))


def stage_names() -> list[str]:
    """Of those that are complete, in the order in which they ended."""
    stamps = sorted(Path("stamps").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return [path.stem for path in stamps if "seconds" in json.loads(path.read_text())]


def data() -> dict[str, Any]:
    report = read("data", "report")
    steps = [
        {name: step[name] for name in ("stage", "name", "documents_in", "documents_out", "bytes_out", "changed")}
        for step in report["steps"]
    ]
    return {
        "steps": steps,
        "faults": [fault for step in report["steps"] for fault in step["named_faults"]],
        "shards": report["shards"],
        "vocab_size": report["vocab_size"],
    }


def training(run: Path) -> dict[str, Any]:
    """Of a run: its settings, how long it took, and its curves."""
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    size = -(-len(rows) // POINTS)
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return {
        "settings": tomllib.loads((run / "config.toml").read_text(encoding="utf-8")),
        "steps": len(rows),
        "tokens": sum(int(row["tokens"]) for row in rows),
        "seconds": sum(float(row["seconds"]) for row in rows),
        "loss": [[int(group[-1]["step"]), sum(float(row["loss"]) for row in group) / len(group)] for group in groups],
        "bits": [[int(row["step"]), float(row["bits_per_byte"])] for row in rows if row["bits_per_byte"]],
    }


def scores(evaluations: dict[str, Evaluation]) -> Iterator[dict[str, Any]]:
    """A row for each score, with its value in each evaluation and those of baselines."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for which, evaluation in evaluations.items():
        for task in evaluation.tasks:
            for score in task.scores:
                row = rows.setdefault(
                    (task.name, score.name),
                    {"task": task.name, "score": score.name, "unit": score.unit, "count": len(task.examples)},
                )
                row[which] = [score.value, score.low, score.high]
            for baseline in task.baselines:
                rows[task.name, baseline.score].setdefault("baselines", {})[baseline.name] = baseline.value
    yield from rows.values()


def changes(evaluations: dict[str, Evaluation]) -> list[dict[str, Any]]:
    """What the paired bootstrap says of a model, beside another and beside copies of the source."""
    found = []
    for against, of in PAIRS:
        compared = compare(evaluations[against], evaluations[of])
        found += [
            {"of": of, "against": against, "task": each.task, "score": each.score, "low": each.low, "high": each.high, "unit": each.unit, "verdict": each.verdict, "confidence": compared.confidence}
            for each in compared.changes if each.decides
        ]  # fmt: skip
    return found


def shown(task: TaskResult) -> list[dict[str, str]]:
    """The first examples of a task, as they came."""
    return [{"prompt": each.prompt, "right": each.references[0], "output": each.output} for each in task.examples[:5]]


# --- bars ------------------------------------------------------------------------------------------------------------


Bar = tuple[str, str, str, bool]
"""Bar or goal, what is asked, what was found, whether it is met."""


def bars(found: dict[str, Any], *, quick: bool) -> Iterator[Bar]:
    bar = "goal" if quick else "bar"
    first, last = (found["runs"]["pretrain"]["bits"][i][1] for i in (0, -1))
    yield "bar", "bits per byte fell in pre-training", f"{first:.3f}, then {last:.3f}", last < first
    for task in ("modern", "folio"):
        yield from below_xz(score(found, task, "bits per byte"), TASKS[task], bar)
    yield from translations(found, bar)
    for task in ("questions", "summaries"):
        share = score(found, task, "accuracy")["after"][0]
        yield "goal", f"{TASKS[task]}: 80 % accepted by the checker", units.percent(share), share >= 0.8
    yield from planted({each["what"]: each["count"] / each["of"] for each in found["planted"]}, bar)
    yield from adapter(found)
    same = found["use"]["same"]
    met = same["fused"] == same["LLM"] == same["of"]
    yield (
        "bar",
        "transformers, fused layers and LLM write the same",
        f"{same['fused']} and {same['LLM']} of {same['of']}",
        met,
    )


def below_xz(row: dict[str, Any], what: str, bar: str) -> Iterator[Bar]:
    value, xz = row["before"][0], row["baselines"]["xz -9 after the training text"]
    yield (
        bar,
        f"{what}: bits per byte below xz, which has read the training text",
        f"{value:.3f} and {xz:.3f}",
        value < xz,
    )
    yield "goal", f"{what}: 0.2 below it", f"{xz - value:.3f}", xz - value >= 0.2


def translations(found: dict[str, Any], bar: str) -> Iterator[Bar]:
    bleu = score(found, "translation", "BLEU")
    after, copied = bleu["after"][0], bleu["copied"][0]
    yield (
        bar,
        "BLEU of translations at least 20 above the source itself",
        f"{after:.1f} and {copied:.1f}",
        after >= copied + 20,
    )
    interval, met = better(found, "before", "translation")
    yield bar, "BLEU better than before tuning, by paired bootstrap", interval, met


def adapter(found: dict[str, Any]) -> Iterator[Bar]:
    interval, met = better(found, "copied", "reversed", of="adapted")
    yield "goal", f"{TASKS['reversed']}: the adapter's BLEU above the source itself, by paired bootstrap", interval, met
    its = found["use"]["adapter"]
    yield (
        "bar",
        "the adapter writes the same beside the model and merged into it",
        f"{its['same']} of {its['of']}",
        its["same"] == its["of"],
    )


def better(found: dict[str, Any], against: str, task: str, *, of: str = "after") -> tuple[str, bool]:
    """The interval of a difference, and whether all of it says better."""
    (change,) = (
        each for each in found["changes"] if (each["of"], each["against"], each["task"]) == (of, against, task)
    )
    return f"{change['low']:+.1f} to {change['high']:+.1f}", change["verdict"] == "better"


def planted(shares: dict[str, float], bar: str) -> Iterator[Bar]:
    for what in ("exact copies found", "near copies found"):
        yield bar, f"{what}: 99 %", units.percent(shares[what]), shares[what] >= 0.99
    lost = shares["clean documents lost"]
    yield bar, "clean documents lost: at most 0.1 %", f"{100 * lost:.2f} %", lost <= 0.001


def score(found: dict[str, Any], task: str, name: str) -> dict[str, Any]:
    return next(row for row in found["scores"] if (row["task"], row["score"]) == (task, name))


# --- the page --------------------------------------------------------------------------------------------------------


def page(result: dict[str, Any], template: Path) -> str:
    """The page's HTML. Whatever comes from texts is escaped."""
    environment = templates("llama_fast.train.report")
    assert environment.loader is not None
    environment.loader = jinja2.ChoiceLoader([jinja2.FileSystemLoader(template.parent), environment.loader])
    environment.filters |= {"size": units.size, "percent": units.percent, "number": units.number}
    curves = {
        name: [
            curve("Loss", "nats a token learnt", run["loss"], steps=run["steps"]),
            curve(
                "Bits per byte",
                "held-out plays" if name == "pretrain" else "held-out answers",
                run["bits"],
                steps=run["steps"],
            ),
        ]
        for name, run in result["runs"].items()
    }
    return environment.get_template(template.name).render(
        result=result, runs=RUNS, tasks=TASKS, curves=curves, shown=shown_score
    )


def shown_score(row: dict[str, Any], which: str) -> str:
    """A score with its interval, "–" where there is none."""
    if which not in row:
        return "–"
    value, low, high = row[which]
    form = units.percent if row["unit"] == "share" else lambda figure: units.number(figure, 4)
    return form(value) if low is None else f"{form(value)} ({form(low)} to {form(high)})"


if __name__ == "__main__":
    sys.exit(main())
