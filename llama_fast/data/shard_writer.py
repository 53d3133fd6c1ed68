"""The step of a datatrove pipeline that turns documents into shards of tokens."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from datatrove.data import Document, DocumentsPipeline
from datatrove.io import DataFolderLike
from datatrove.pipeline.tokens.tokenizer import DocumentTokenizer, TokenizedFile
from tokenizers.processors import TemplateProcessing

from llama_fast.data.bpe import fingerprint
from llama_fast.data.shards import INFO, ShardInfo
from llama_fast.decoder.tokenizer import Tokenizer
from llama_fast.reports.jsonfile import SCHEMA


class ShardWriter(DocumentTokenizer):  # type: ignore[misc]
    """datatrove's `DocumentTokenizer` with one BOS and one EOS a document, in its order, and a `ShardInfo` beside each shard.

    A text is text: where it spells a special token (a page about HTML's `<s>`), it gets the tokens of those characters.
    A document begins with BOS if the tokenizer puts one before a text, and ends with EOS if it has one; an empty document is
    these alone.

    Args:
        output: the folder of shards.
        tokenizer: a folder, or a model's .gguf file.
        shard_characters: a shard ends with the document that reaches so many; a document is never cut. 2**28 are some 80
            million tokens of English, 160 MB.
    """

    name = "tokenize"

    def __init__(self, output: DataFolderLike, tokenizer: str | Path, *, shard_characters: int = 2**28) -> None:
        if shard_characters < 1:
            raise ValueError(f"shard_characters must be at least 1, got {shard_characters}")
        super().__init__(output, str(tokenizer), shuffle_documents=False)
        self.shard_characters = shard_characters
        ours = Tokenizer(tokenizer)
        self.bos_id, self.eos_id, self.fingerprint = ours.bos_id, ours.eos_id, fingerprint(ours)

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The backend, which adds BOS and EOS. `Tokenizer` has turned off padding, which would lengthen every document of a batch."""
        backend = Tokenizer(self.tokenizer_name_or_path).backend
        backend.encode_special_tokens = True
        around = [("BOS", self.bos_id), ("EOS", self.eos_id)]
        backend.post_processor = TemplateProcessing(
            single=" ".join(["BOS"] * (self.bos_id is not None) + ["$A"] + ["EOS"] * (self.eos_id is not None)),
            pair=None,
            special_tokens=[(name, token_id) for name, token_id in around if token_id is not None],
        )
        return backend

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Writes the shards of task `rank`, in place of those that an interrupted run has left."""
        for path in self.output_folder.glob(f"{rank:05d}_*.ds*"):
            self.output_folder.rm_file(path)
        documents = iter(data or ())
        written: list[TokenizedFile] = []
        while not written or (head := next(documents, None)) is not None:
            ahead = chain([head], documents) if written else documents
            written.append(self.write_unshuffled(self._one_shard(ahead), f"{rank:05d}_{len(written):05d}.ds"))
        for part, shard in enumerate(written):
            info = ShardInfo(
                tokenizer=self.fingerprint,
                dtype=np.dtype(f"u{self.token_size}").name,
                documents=len(shard.doc_ends),
                tokens=len(shard),
                bos_id=self.bos_id,
                eos_id=self.eos_id,
                task=rank,
                tasks=world_size,
                part=part,
                parts=len(written),
            )
            with self.output_folder.open(shard.filename + INFO, "wt") as file:
                file.write(json.dumps({"schema": SCHEMA} | asdict(info), indent=2))

    def _one_shard(self, documents: Iterator[Document]) -> Iterator[Document]:
        characters = 0
        for document in documents:
            try:
                document.text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"document {document.id} is not Unicode: its character {error.start} is {document.text[error.start]!r}, half of a pair"
                ) from None
            yield document
            characters += len(document.text)
            if characters >= self.shard_characters:
                return
