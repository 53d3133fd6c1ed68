"""What is known of a run from what it has left on disk: the records of its tasks, its tokenizer, its shards."""

from importlib.metadata import version
from pathlib import Path

import tokenizers

from ...reports.jsonfile import read_json
from ..config import Config
from ..report import record
from ..shards import ShardInfo
from ..steps.adapter import read_records
from ..steps.mixture import tokens_of_sources
from . import state


def folder(work: Path, stage: str, name: str) -> Path:
    """Where the tasks of a pipeline leave their records."""
    return work / stage / "records" / name


def records(work: Path) -> list[record.Step]:
    """What the steps have counted so far, in their order."""
    folders = [
        folder(work, "collect", "collect"), folder(work, "clean", "clean"), work / "dedup" / "records",
        folder(work, "tokenize", "mixture"),
    ]  # fmt: skip
    return [step for each in folders for step in read_records(each)]


def report(config: Config, named: str, *, complete: bool) -> record.Report:
    """All that is known. Of mixture and shards only when they are `complete`."""
    out = Path(config.out)
    work = out / "work"
    held_out = folder(work, "collect", "collect_held_out"), folder(work, "clean", "held_out")
    made = record.Report(
        named, config.out, versions(), state.flat(config), records(work), [step for each in held_out for step in read_records(each)]
    )  # fmt: skip
    if (file := out / "tokenizer" / "tokenizer.json").exists():
        made.vocab_size = tokenizers.Tokenizer.from_file(str(file)).get_vocab_size()
    if complete:
        made.mixture = _mixture(
            config, *(tokens_of_sources(work / "tokenize" / name) for name in ("tokens", "tokens_used"))
        )
        made.shards = [
            _shards(out / name, steps[-1].bytes_out)
            for name, steps in (("shards", made.steps), ("shards_held_out", made.held_out))
            if steps and (out / name).is_dir()
        ]
    return made


def _mixture(config: Config, before: dict[str, int], after: dict[str, int]) -> list[record.SourceShare]:
    return [
        record.SourceShare(name, weight, before[name], after.get(name, 0)) for name, weight in config.weights.items()
    ]


def _shards(where: Path, size: int) -> record.Shards:
    infos = [read_json(file, ShardInfo) for file in sorted(where.glob("*.ds.json"))]
    return record.Shards(
        str(where), len(infos), sum(info.documents for info in infos), sum(info.tokens for info in infos), size
    )


def versions() -> list[str]:
    """What the output depends on, as "name version"."""
    return [f"{name} {version(name)}" for name in ("llama-fast", "datatrove", "ftfy", "tokenizers", "xxhash")]
