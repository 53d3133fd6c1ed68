"""Summaries of many rows on many machines: Ray Data with actors that each hold an engine.

    pip install "llama-fast[ray]"
    python examples/ray_batch.py smollm2 examples/tasks/summaries.jsonl out --actors 2

Rows come from JSONL files, and go to JSONL files in the folder `out`, in no particular order, with the field "output" beside their own.
An actor that dies is started again, and what it had not finished is computed again: no row is lost, and none is there twice.
A row whose text is empty ends the job with an error that says so; `.filter(...)` after `read_json` leaves such rows out.
On a cluster, `ray job submit` this file there; on a GPU machine add `num_gpus=1` to `map_batches`.
"""

import argparse
from typing import Any

import ray

from llama_fast import LLM, summarize


class Summarizer:
    """What an actor holds: one engine for all of its batches."""

    def __init__(self, model: str) -> None:
        self.llm = LLM(model, progress=False)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "output": summarize(self.llm, list(batch["text"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a .gguf file, a hub id, smollm2, or embedded")
    parser.add_argument("rows", help="a .jsonl file, or a folder of them, with a field text")
    parser.add_argument("out", help="a folder to write to")
    parser.add_argument("--actors", type=int, default=2, help="engines at a time")
    parser.add_argument("--batch", type=int, default=32, help="rows that an engine is given at a time")
    options = parser.parse_args()
    ray.init(include_dashboard=False)
    # a block is a batch: what a dead actor had finished of a block is computed again. Half a CPU, by Ray's count, leaves room for reading
    # and writing beside two actors on two cores
    ray.data.read_json(options.rows).repartition(target_num_rows_per_block=options.batch).map_batches(
        Summarizer, fn_constructor_args=(options.model,), batch_size=options.batch, concurrency=options.actors, num_cpus=0.5
    ).write_json(options.out)  # fmt: skip


if __name__ == "__main__":
    main()
