"""A tiny corpus: a tokenizer of bytes and a few merges, shards of it, and a run of a model that is as small."""

from dataclasses import replace
from pathlib import Path

import pytest
from datatrove.data import Document

from llama_fast.config_file import read_config
from llama_fast.data.bpe import BpeConfig, train_tokenizer
from llama_fast.data.shard_writer import ShardWriter
from llama_fast.data.stories import write_documents
from llama_fast.train.config import TrainConfig

VOCAB = 272
CONFIG = """
[data]
train = "{root}/train"
validation = "{root}/validation"
tokenizer = "{root}/bpe"

[model]
hidden_size = 64
intermediate_size = 112
num_layers = 2
num_heads = 4
num_kv_heads = 2

[batch]
sequence_length = 48
rows = 2
micro_batches = 4

[optimizer]
lr = 3e-3

[schedule]
steps = 6
warm_up = 1

[run]
out = "{out}"
log_every = 2
evaluate_every = 3
save_every = 2
validation_tokens = 500
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    texts = [document.text for document in write_documents("story", 24, seed=1)]
    train_tokenizer(texts, root / "bpe", BpeConfig(vocab_size=VOCAB))
    for name, its in (("train", texts[:20]), ("validation", texts[20:])):
        documents = (Document(text=text, id=str(i)) for i, text in enumerate(its))
        ShardWriter(str(root / name), root / "bpe").run(documents, 0, 1)
    return root


@pytest.fixture
def config(corpus, tmp_path):
    """Makes a config: `config("run.seed=1", ...)`; the run's folder is `tmp_path / out`."""

    def make(*settings: str, out: str = "run") -> TrainConfig:
        file = tmp_path / "train.toml"
        file.write_text(CONFIG.format(root=corpus, out=tmp_path / out))
        return read_config(file, TrainConfig, settings)

    return make


def longer(config: TrainConfig, steps: int) -> TrainConfig:
    return replace(config, schedule=replace(config.schedule, steps=steps))
