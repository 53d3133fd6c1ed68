"""Doubles: exact ones by datatrove's exact deduplication, near ones by its MinHash in four stages. All on disk, all resumable."""

from collections.abc import Callable, Sequence
from pathlib import Path

import regex
import xxhash
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)

from ..config import Dedup
from ..documents import Document
from .adapter import Consumed, Counted, ReadDocuments, WriteDocuments
from .words import HASH, WORDS

_NO_LETTERS = regex.compile(r"[^\p{L}\p{M}\p{N}]+")

Execute = Callable[[str, Sequence[PipelineStep], int], None]
"""Runs a pipeline: its name, its steps, how many tasks."""


def content(document: Document) -> bytes:
    """What two exact doubles have in common: letters and digits in lower case, hashed by xxh3 (128 bits)."""
    letters = _NO_LETTERS.sub("", document.text.lower())
    return xxhash.xxh3_128_digest((letters or document.text).encode())


def remove_doubles(source: Path, target: Path, work: Path, settings: Dedup, *, tasks: int, execute: Execute) -> None:
    """Writes the documents of `source` to `target` without doubles. Of each group the first document stays, or one of MinHash's choice.

    Args:
        work: folder for signatures and for what exact deduplication leaves.
        execute: see `Execute`.
    """
    records = work / "records"
    exact = ExactDedupConfig(content_getter=content, hash_config=HASH)
    singles = work / "singles"
    before_minhash = [ReadDocuments(source)]
    if settings.exact:
        sign = Consumed("dedup", 0, "hashes of texts", ExactDedupSignature(str(work / "exact"), exact), records)
        execute("exact signatures", [ReadDocuments(source), sign], tasks)
        execute("exact doubles", [ExactFindDedups(str(work / "exact"), str(work / "doubles"), exact)], 1)
        found = ExactDedupFilter(str(work / "doubles"), exact)
        before_minhash.append(Counted("dedup", 1, "exact doubles", found, "double", records))
    if not settings.minhash:
        execute("without doubles", [*before_minhash, WriteDocuments(target)], tasks)
        return
    config = MinhashConfig(
        n_grams=settings.ngram, num_buckets=settings.buckets, hashes_per_bucket=settings.hashes, hash_config=HASH
    )
    block = MinhashDedupSignature(str(work / "signatures"), config, language=WORDS)
    signature = Consumed("dedup", 2, "MinHash signatures", block, records)
    execute("signatures", [*before_minhash, WriteDocuments(singles), signature], tasks)
    buckets = MinhashDedupBuckets(str(work / "signatures"), str(work / "pairs"), config=config)
    execute("pairs", [buckets], settings.buckets)
    execute("clusters", [MinhashDedupCluster(str(work / "pairs"), str(work / "remove"), config)], 1)
    near = Counted(
        "dedup", 3, "near doubles (MinHash)", MinhashDedupFilter(str(work / "remove")), "near double", records
    )
    execute("without near doubles", [ReadDocuments(singles), near, WriteDocuments(target)], tasks)
