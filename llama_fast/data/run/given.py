"""What a run was told and given: the settings of each step, and a hash of every file that it reads."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import xxhash

from ..bpe import BpeConfig, tokenizer_files
from ..config import Config, Source
from ..read.inputs import Input, fingerprint, list_inputs
from ..steps import filters

About: TypeAlias = tuple[dict[str, Any], dict[str, str]]
"""Settings by their names, hashes by the names of files."""


class Given:
    """Of a configuration. Files are listed and hashed once.

    Raises:
        ValueError: a setting or a file is not what it must be. So a step that comes late says so before the first one runs.
        OSError: a source cannot be reached.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._inputs: list[Input] = []
        self._known: dict[str, About] = {}

    def about(self, step: str) -> About:
        """Settings and inputs of a step."""
        if step not in self._known:
            self._known[step] = getattr(self, f"_{step}")()
        return self._known[step]

    def _collect(self) -> About:
        sources = [{k: v for k, v in asdict(source).items() if k != "weight"} for source in self.config.sources]
        return (
            {"tasks": self.config.tasks, "sources": sources},
            {made.file: fingerprint(made) for made in self.inputs()},
        )

    def _clean(self) -> About:
        chosen = self.config
        for name, make in filters.steps(chosen.filters):
            if name == "language":  # finds out here what is not installed, or not known
                make()
        settings = {"clean": chosen.clean, "filters": chosen.filters, "decontaminate": chosen.decontaminate}
        return settings, {made.file: fingerprint(made) for _, inputs in self.evaluation_sets() for made in inputs}

    def _dedup(self) -> About:
        return {"dedup": asdict(self.config.dedup)}, {}

    def _tokenizer(self) -> About:
        chosen = self.config.tokenizer
        if chosen.path is None:
            self.bpe()  # says what is wrong with it
        files = tokenizer_files(chosen.path) if chosen.path else []
        files += [Path(chosen.chat_template)] if chosen.chat_template else []
        return {"tokenizer": asdict(chosen)}, {
            str(file): xxhash.xxh3_128_hexdigest(file.read_bytes()) for file in files
        }

    def _tokenize(self) -> About:
        weights = {source.name: source.weight for source in self.config.sources}
        return {"seed": self.config.seed, "mixture": asdict(self.config.mixture), "weights": weights}, {}

    def inputs(self) -> list[Input]:
        """The files of all sources."""
        if not self._inputs:
            self._inputs = [made for source in self.config.sources for made in self._files_of(source)]
        return self._inputs

    def _files_of(self, source: Source) -> list[Input]:
        """Without those of this run, where its folder lies in the source's. A collection is fetched into the cache first."""
        folder = None
        if source.collection is not None:
            from ..sources import collect

            folder = str(collect(source.collection))
        ours = f"file://{Path(self.config.out).absolute()}/"
        inputs = [each for each in list_inputs(source, folder) if not each.address.startswith(ours)]
        if unused := [each for each in source.hold_out if not any(made.matches(each) for made in inputs)]:
            raise ValueError(f"source {source.name!r}: no file is named as {unused[0]!r}, which hold_out says")
        return inputs

    def evaluation_sets(self) -> list[tuple[str, list[Input]]]:
        """The files of each evaluation set, by its name."""
        return [
            (each.name, list_inputs(Source(each.name, each.path, format=each.format, text=each.text)))
            for each in self.config.decontaminate.against
        ]

    def bpe(self) -> BpeConfig:
        """What is to be trained."""
        chosen = self.config.tokenizer
        config = BpeConfig(vocab_size=chosen.vocab_size, special_tokens=chosen.special_tokens)
        if chosen.chat_template is None:
            return config
        if not (file := Path(chosen.chat_template)).is_file():
            raise ValueError(f"tokenizer.chat_template must be a file, and there is none at {file}")
        return replace(config, chat_template=file.read_text(encoding="utf-8"))
