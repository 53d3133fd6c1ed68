"""Small corpora with known dirt, for the tests of whole runs."""

import gzip
import json
import pydoc_data.topics
import random
from pathlib import Path

CONFIG = """
out = "out"
tasks = 3
[[sources]]
name = "manual"
path = "texts"
[tokenizer]
vocab_size = 600
"""


def paragraphs(count: int, *, seed: int = 0) -> list[str]:
    """Different texts of some 80 words each, of the words of Python's manual."""
    rng = random.Random(seed)
    words = sorted({word for text in pydoc_data.topics.topics.values() for word in text.split() if word.isalpha()})
    common = ["the", "of", "and", "to", "that", "is", "in", "it", "be", "as"]
    return [
        " ".join(rng.choice(common) if rng.random() < 0.35 else rng.choice(words) for _ in range(80)) + "."
        for _ in range(count)
    ]


def write_corpus(folder: Path, texts: list[str], *, files: int = 4) -> None:
    """As JSON lines, in turns over the files, one of which is compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[i::files]).encode()
        if i == 0:
            (folder / "part0.jsonl.gz").write_bytes(gzip.compress(lines))
        else:
            (folder / f"part{i}.jsonl").write_bytes(lines)
