"""What the adapter is tuned on, and judged by: lines as they are spelt today, to spell as in 1623.

python reversed.py reversed.toml [--lines N]

reversed_tune.jsonl       conversations to learn from, of plays that are not held out
reversed_held_out.jsonl   some of held-out plays, to look at while it learns
reversed.jsonl            the other lines of these for the task that is given, which is copied beside it
"""

import argparse
import random
import shutil
from pathlib import Path

from conversations import chat, pairs, write

HELD_OUT = 200


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write reversed_tune.jsonl, reversed_held_out.jsonl and reversed.jsonl here."
    )
    parser.add_argument("task", type=Path, help="how reversed.jsonl is asked")
    parser.add_argument("--lines", type=int, default=10_000, help="to learn from")
    asked = parser.parse_args()
    lines = list(pairs())
    random.Random(0).shuffle(lines)
    held_out = [line for line in lines if line["held_out"]]
    learnt = [line for line in lines if not line["held_out"]][: asked.lines]
    write("reversed_tune.jsonl", [conversation(line) for line in learnt])
    write("reversed_held_out.jsonl", [conversation(line) for line in held_out[:HELD_OUT]])
    write("reversed.jsonl", held_out[HELD_OUT:])
    shutil.copy(asked.task, ".")


def conversation(line: dict) -> dict:
    return chat([(f"Today: {line['target']}\n1623:", line["source"])])


if __name__ == "__main__":
    main()
