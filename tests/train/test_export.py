"""What a run has learnt is a folder that transformers, `LLM` and training itself load."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_fast import LLM, SamplingParams
from llama_fast.data.shards import Shards
from llama_fast.evaluate.perplexity import Windows, score_documents
from llama_fast.train import checkpoints
from llama_fast.train.export import export
from llama_fast.train.loop import train
from llama_fast.train.model import Packed
from llama_fast.train.validation import continued
from tests.parity import not_interpreted
from tests.train.test_loop import quiet
from tests.train.test_model import loaded

pytestmark = not_interpreted


@pytest.mark.parametrize("tied", ["true", "false"])
def test_logits_and_weights_are_the_same_everywhere(config, tmp_path, tied):
    made = config(f"model.tied_embeddings={tied}", "optimizer.lr=0.02", "schedule.steps=4")
    train(made, show=quiet)
    export(made.run.out, tmp_path / "hf")
    ours = checkpoints.load_weights(checkpoints.folders(made.run.out)[4])
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    ids = torch.tensor(tokenizer("Once upon a time")["input_ids"])
    torch.testing.assert_close(
        ours.logits(Packed.of(ids, [len(ids)])), theirs(ids[None]).logits[0], rtol=1e-5, atol=1e-5
    )
    again = loaded(tmp_path / "hf")
    assert all(torch.equal(again.get_parameter(name), weight) for name, weight in ours.named_parameters())
    llm = LLM(tmp_path / "hf", progress=False)
    assert tokenizer.eos_token_id in theirs.generation_config.eos_token_id
    written = llm.generate("Once upon", SamplingParams(temperature=0.0, max_tokens=8))[0].text
    assert continued(ours, llm.tokenizer, "Once upon", tokens=8) == "Once upon" + written


def test_bits_per_byte_are_those_of_evaluation(config, tmp_path):
    """Of documents that fit a row, whose context is the same for both."""
    made = config("batch.sequence_length=512", "batch.rows=1", "schedule.steps=1", "run.validation_tokens=100000")
    progress = train(made, show=quiet).progress
    export(made.run.out, tmp_path / "hf", step=1)
    llm = LLM(tmp_path / "hf", progress=False, dtype="float32")
    shards = Shards(made.data.validation, llm.tokenizer)
    assert max(shards.lengths()) <= 512
    texts = [llm.tokenizer.decode(document.tolist()) for document in shards]
    passages = [passage for each in score_documents(llm, texts, Windows(window=512)) for passage in each]
    nats, _, size = (sum(numbers) for numbers in zip(*(passage.statistics for passage in passages), strict=True))
    assert progress.best == pytest.approx(nats / 0.6931471805599453 / size, rel=1e-5)


def test_a_run_goes_on_from_an_exported_model(config, tmp_path):
    first = config("schedule.steps=2", out="first")
    train(first, show=quiet)
    export(first.run.out, tmp_path / "hf")
    sizes = [
        f"model.{name}" for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
    ]
    file = tmp_path / "train.toml"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line for line in lines if f"model.{line.split(' ')[0]}" not in sizes))
    from llama_fast.config_file import read_config
    from llama_fast.train.config import TrainConfig

    second = read_config(
        file, TrainConfig, [f"model.path={tmp_path / 'hf'}", f"run.out={tmp_path / 'second'}", "schedule.steps=1"]
    )
    progress = train(second, show=quiet).progress
    assert progress.best is not None and progress.best < 6


@pytest.mark.parametrize("arguments", [dict(step=3), dict(folder="full"), dict(run="nowhere")])
def test_what_cannot_be_exported_is_said(config, tmp_path, arguments):
    made = config("schedule.steps=1")
    train(made, show=quiet)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    messages = dict(
        step="no checkpoint of step 3; there are 1", folder="not an empty folder", run="nowhere has no checkpoint"
    )
    with pytest.raises(ValueError, match=messages[next(iter(arguments))]):
        export(
            tmp_path / arguments.get("run", "run"), tmp_path / arguments.get("folder", "hf"), step=arguments.get("step")
        )
    assert not (tmp_path / "hf").exists()
