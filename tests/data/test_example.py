"""The settings in examples/shakespeare: they are valid, and the run of them is what it says."""

from dataclasses import replace
from pathlib import Path

import pytest

from llama_fast.config_file import read_config
from llama_fast.data.config import Config
from llama_fast.data.run.pipeline import Run
from llama_fast.data.shards import Shards
from llama_fast.data.sources import NAMES
from llama_fast.decoder.tokenizer import Tokenizer

FILE = Path(__file__).parents[2] / "examples" / "shakespeare" / "data.toml"


def test_its_settings_are_valid():
    config = read_config(FILE, Config)
    assert all(source.collection in NAMES for source in config.sources)


@pytest.mark.nightly
def test_plays_become_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path / "cache"))
    run = Run(replace(read_config(FILE, Config), out=str(tmp_path / "out")))
    try:
        run.run()
    except ValueError as error:
        if "could not be downloaded" in str(error):
            pytest.skip(str(error))
        raise
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer")
    trained, held_out = (Shards(tmp_path / "out" / name, tokenizer) for name in ("shards", "shards_held_out"))
    assert (len(trained), len(held_out)) == (4061, 182)
    text = " ".join(tokenizer.decode(document) for document in held_out)
    assert text.count("When shall we three meet again") == 2  # Macbeth in both spellings, and in no training document
    assert not any("shall we three meet again" in tokenizer.decode(document) for document in trained)
