"""Raw text as one finds it: Shakespeare's plays and small stories in files of several kinds, with dirt planted in them.

    python raw.py [--plays N]     writes raw/ and planted.jsonl where it is run

planted.jsonl has a line for each document: its `id`, what was done to it (`dirt`), which document it is a copy of (`of`), and for dirt that
can be mended the `text` that it should become again. `planted.py` reads it when the data pipeline is done.

    mojibake   decoded with the wrong encoding: “’” became “â€™”        page    a page of HTML with a menu, a script and a banner
    control    control characters between the letters                   exact   a copy in small letters, with other spaces
    near       a copy with one word in a hundred changed                leak    the same of a passage that is held out
    broken     behind the place where a .gz file breaks off, or half a line of JSON
"""

import argparse
import gzip
import html
import json
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llama_fast.data.sources import collect
from llama_fast.data.sources.shakespeare import HELD_OUT
from llama_fast.data.stories import write_documents

SHARE = {"mojibake": 0.02, "control": 0.02, "page": 0.01, "exact": 0.03, "near": 0.03}
"""Of the passages of plays, rounded up. LEAKS is a share of those held out."""
LEAKS = 0.2
CHANGED_WORDS = 0.01
STORIES, CUT = 6000, 600
"""In stories.jsonl.gz, and in cut.jsonl.gz, which breaks off after 60 % of its bytes."""
CONTROL = "\x00\x07\x08\x0b\x1b\x7f\u200b\ufeff"
PAGE = """<!doctype html>
<html><head><meta charset="utf-8"><title>{title}</title><script>track("{title}");</script></head>
<body><nav><a href="/">Home</a> <a href="/plays">Plays</a></nav>
<main><article>{body}</article></main>
<footer>We use cookies to improve this site. <button>Accept</button></footer></body></html>
"""


@dataclass(frozen=True)
class Planted:
    """A document as it lies in raw/, and what is known of it."""

    id: str
    file: str
    text: str
    dirt: str = ""
    of: str = ""
    meant: str = ""

    def record(self) -> dict[str, str]:
        known = {key: value for key, value in asdict(self).items() if key in ("id", "dirt", "of") and value}
        return known | ({"text": self.meant} if self.meant else {})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write raw/ and planted.jsonl here.")
    parser.add_argument("--plays", type=int, help="how many plays to take beside those held out; all by default")
    count = parser.parse_args().plays
    rng = random.Random(0)
    passages = list(read_plays(count))
    held_out = [each for each in passages if is_held_out(each)]
    documents = [*dirty([each for each in passages if not is_held_out(each)], rng), *held_out]
    documents += leaks(held_out, rng)
    documents += stories(1.0 if count is None else count / 36)
    write(documents, Path("raw"))
    Path("planted.jsonl").write_text("".join(json.dumps(each.record()) + "\n" for each in documents))
    print(f"{len(documents):,} documents in raw/, {sum(bool(each.dirt) for each in documents):,} of them with dirt")


# --- what there is ---------------------------------------------------------------------------------------------------


def read_plays(count: int | None) -> Iterator[Planted]:
    """Passages of the first `count` plays that have both editions (all plays and poems for None), and of those held out."""
    folder = collect("shakespeare")
    both = sorted({path.stem for path in (folder / "folio").iterdir()} - {*HELD_OUT})
    chosen = None if count is None else {*both[:count], *HELD_OUT}
    for path in sorted(folder.rglob("*.jsonl")):
        if chosen is None or path.stem in chosen:
            name = f"{path.parent.name}/{path.stem}"
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                yield Planted(record["id"], f"plays/{name}.jsonl", record["text"])


def is_held_out(document: Planted) -> bool:
    return Path(document.file).stem in HELD_OUT


def stories(share: float) -> Iterator[Planted]:
    for seed, (file, count) in enumerate({"stories": round(STORIES * share), "cut": CUT}.items()):
        for number, document in enumerate(write_documents("story", count, seed=seed)):
            yield Planted(f"{file}/{number}", f"{file}.jsonl.gz", document.text)


# --- dirt ------------------------------------------------------------------------------------------------------------


def dirty(documents: list[Planted], rng: random.Random) -> Iterator[Planted]:
    """The documents, some of them spoilt, and copies of others; none has dirt of two kinds."""
    count = {dirt: -int(-share * len(documents) // 1) for dirt, share in SHARE.items()}
    plain = [each for each in documents if each.text.isascii() and "'" in each.text]
    chosen = iter(rng.sample(plain, sum(count.values())))
    victims = {next(chosen).id: dirt for dirt, number in count.items() for _ in range(number)}
    for document in documents:
        dirt = victims.get(document.id, "")
        if dirt in ("exact", "near"):
            yield document
            text = muttered(document.text) if dirt == "exact" else changed(document.text, rng)
            yield Planted(f"{dirt}/{document.id}", "copies.jsonl", text, dirt, document.id)
        elif dirt == "mojibake":
            meant = document.text.replace("'", "’").replace("--", "—")
            yield replace(document, text=meant.encode().decode("cp1252"), dirt=dirt, meant=meant)
        elif dirt == "control":
            yield replace(document, text=with_control(document.text, rng), dirt=dirt, meant=document.text)
        elif dirt == "page":
            name = document.id.replace("/", "-")
            body = "".join(
                f"<p>{html.escape(part).replace(chr(10), '<br>')}</p>\n" for part in document.text.split("\n\n")
            )
            page = PAGE.format(title=name, body=body)
            # the pipeline calls a document without an id by its file and line
            yield Planted(f"raw/pages/{name}.html:1", f"pages/{name}.html", page, dirt, meant=document.text)
        else:
            yield document


def leaks(held_out: list[Planted], rng: random.Random) -> Iterator[Planted]:
    for document in rng.sample(held_out, round(LEAKS * len(held_out))):
        yield Planted(f"leak/{document.id}", "copies.jsonl", changed(document.text, rng), "leak", document.id)


def muttered(text: str) -> str:
    return "  " + text.lower().replace("\n", "\r\n")


def changed(text: str, rng: random.Random) -> str:
    """Some of the words are others, taken from elsewhere in it."""
    words = re.split(r"(\s+)", text)
    places = [i for i, word in enumerate(words) if word.isalpha()]
    for i in rng.sample(places, max(1, round(CHANGED_WORDS * len(places)))):
        words[i] = words[rng.choice(places)]
    return "".join(words)


def with_control(text: str, rng: random.Random) -> str:
    for _ in range(5):
        at = rng.randrange(1, len(text))
        text = text[:at] + rng.choice(CONTROL) + text[at:]
    return text


# --- files -----------------------------------------------------------------------------------------------------------


def write(documents: Iterable[Planted], folder: Path) -> None:
    files: dict[str, list[Planted]] = {}
    for document in documents:
        files.setdefault(document.file, []).append(document)
    shutil.rmtree(folder, ignore_errors=True)
    for name, its in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"id": each.id, "text": each.text}) for each in its]
        if name.endswith(".html"):
            path.write_text(its[0].text, encoding="utf-8")
        elif name.endswith(".gz"):
            packed = gzip.compress("\n".join(lines).encode(), mtime=0)
            path.write_bytes(packed[: 6 * len(packed) // 10] if name.startswith("cut") else packed)
        else:
            if name == "copies.jsonl":
                lines.insert(len(lines) // 2, lines[0][:40])  # half a line
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
