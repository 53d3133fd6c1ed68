"""What became of the dirt that raw.py planted, as planted.json; and the text to judge models by.

modern.jsonl and folio.jsonl are the held-out plays, each edition for itself: `xz` would find a play again in the other spelling, where the model
reads one passage at a time (2.02 bits a byte for both in a row, 2.52 and 2.61 for one). training.txt is all text that the model is
trained on: `xz` may read it before, as the model has.
"""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa

from llama_fast.reports.jsonfile import write_whole

MENDED = {"mojibake": "mojibake repaired", "control": "control characters removed", "page": "pages of HTML made text"}
COPIES = ("exact", "near")
EDITIONS = ("modern", "folio")


def main() -> None:
    planted = [json.loads(line) for line in Path("planted.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = {each["id"]: each["text"] for each in documents(Path("data/dedup"))}
    held_out = {each["id"]: each["text"] for each in documents(Path("data/held_out"))}
    for edition in EDITIONS:
        texts = [text for name, text in held_out.items() if name.startswith(edition)]
        write_whole(Path(f"{edition}.jsonl"), "".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_whole(Path("training.txt"), "\n".join(kept.values()) + "\n")
    found = [*clean(planted, kept, held_out), *mended(planted, kept), *copies(planted, kept)]
    write_whole(Path("planted.json"), json.dumps(found, indent=1))
    for each in found:
        print(f"{each['what']}: {each['count']:,} of {each['of']:,}")


def documents(folder: Path) -> Iterator[dict]:
    for path in sorted(folder.glob("*.jsonl.zst")):
        with pa.input_stream(str(path), compression="zstd") as stream:
            yield from map(json.loads, stream.read().splitlines())


def clean(planted: list[dict], kept: dict[str, str], held_out: Collection[str]) -> Iterator[dict]:
    """Documents that nothing was done to. One of which a copy was kept instead is not lost."""
    copied = {each["of"] for each in planted if each.get("dirt") in COPIES and each["id"] in kept}
    ids = [each["id"] for each in planted if "dirt" not in each and not each["id"].startswith("cut/")]
    lost = [name for name in ids if name not in kept and name not in held_out and name not in copied]
    yield {"what": "clean documents lost", "count": len(lost), "of": len(ids), "examples": lost[:5]}
    cut = [each["id"] for each in planted if each["id"].startswith("cut/")]
    yield {
        "what": "documents read of a .gz that breaks off",
        "count": sum(name in kept for name in cut),
        "of": len(cut),
    }


def mended(planted: list[dict], kept: dict[str, str]) -> Iterator[dict]:
    for dirt, what in MENDED.items():
        its = [each for each in planted if each.get("dirt") == dirt]
        wrong = [each["id"] for each in its if words(kept.get(each["id"], "")) != words(each["text"])]
        yield {"what": what, "count": len(its) - len(wrong), "of": len(its), "examples": wrong[:5]}


def words(text: str) -> list[str]:
    return re.sub(r"[\x00\ufeff]", "", text).split()


def copies(planted: list[dict], kept: dict[str, str]) -> Iterator[dict]:
    for dirt in COPIES:
        its = [each for each in planted if each.get("dirt") == dirt]
        twice = [each["id"] for each in its if each["id"] in kept and each["of"] in kept]
        yield {"what": f"{dirt} copies found", "count": len(its) - len(twice), "of": len(its), "examples": twice[:5]}
    leaked = [each["id"] for each in planted if each.get("dirt") == "leak"]
    there = [name for name in leaked if name in kept]
    yield {
        "what": "copies of held-out passages found",
        "count": len(leaked) - len(there),
        "of": len(leaked),
        "examples": there[:5],
    }


if __name__ == "__main__":
    main()
