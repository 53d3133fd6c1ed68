"""What the model is tuned on, and judged by: lines of 1623 to spell as today, stories to ask about and to sum up.

python conversations.py translation.toml [--lines N] [--stories N]

tune.jsonl          conversations to learn from, shuffled
held_out.jsonl      some of held-out plays and worlds, to look at while it learns
translation.jsonl   lines of held-out plays for the task that is given, which is copied beside it
"""

import argparse
import json
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama_fast.data import stories
from llama_fast.data.sources import collect
from llama_fast.reports.jsonfile import write_whole

TURNS = 6
"""Questions about a story: to find a fact again is hard to learn, so it is asked for often."""
HELD_OUT = 200, 40
"""Lines and stories to look at while it learns."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tune.jsonl, held_out.jsonl and translation.jsonl here.")
    parser.add_argument("task", type=Path, help="how translation.jsonl is asked")
    parser.add_argument("--lines", type=int, default=65_000, help="of plays, to learn from")
    parser.add_argument("--stories", type=int, default=8_000, help="to learn from")
    asked = parser.parse_args()
    rng = random.Random(0)
    lines = {held_out: [each for each in pairs() if each["held_out"] == held_out] for held_out in (False, True)}
    for its in lines.values():
        rng.shuffle(its)
    write("tune.jsonl", conversations(lines[False][: asked.lines], asked.stories, rng, held_out=False))
    write("held_out.jsonl", conversations(lines[True][: HELD_OUT[0]], HELD_OUT[1], rng, held_out=True))
    write("translation.jsonl", lines[True][HELD_OUT[0] :])
    shutil.copy(asked.task, ".")


def pairs() -> Iterator[dict]:
    for path in sorted(collect("shakespeare-pairs").glob("*.jsonl")):
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def conversations(lines: list[dict], count: int, rng: random.Random, *, held_out: bool) -> list[dict]:
    made = [chat([translation(line)]) for line in lines]
    made += [chat(reading(rng, held_out=held_out)) for _ in range(count)]
    rng.shuffle(made)
    return made


def translation(line: dict) -> tuple[str, str]:
    return f"1623: {line['source']}\nToday:", line["target"]


def reading(rng: random.Random, *, held_out: bool) -> list[tuple[str, str]]:
    """A story, questions about it, and its summary, in any order."""
    text = stories.write_story(rng, held_out=held_out).text
    story = stories.parse_story(text)
    asked = [(f"Question: {question}\nAnswer:", answer) for question, answer in stories.questions(story)]
    asked = rng.sample(asked, min(TURNS, len(asked)))
    asked.insert(rng.randrange(2) * len(asked), ("Summary:", rng.choice(stories.summaries(story))))
    (first, answer), *rest = asked
    return [(f"Story: {text}\n{first}", answer), *rest]


def chat(turns: list[tuple[str, str]]) -> dict:
    roles = ("user", "assistant")
    return {
        "messages": [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]
    }


def write(name: str, values: Iterable[dict]) -> None:
    write_whole(Path(name), "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


if __name__ == "__main__":
    main()
