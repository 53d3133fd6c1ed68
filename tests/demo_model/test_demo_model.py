"""The model inside the package: small, well-formed, and it writes the grammar on prompts from worlds it was never trained on."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import llama_fast
from llama_fast.data import stories

FOLDER = Path(llama_fast.__file__).parent / "demo_model"
COUNT = 40


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def complete(model, tokenizer, prompts: list[str], **how) -> list[str]:
    """What the model writes after each prompt, up to its end of text."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=160, **how
        )
    written = output[:, inputs.input_ids.shape[1] :]
    assert (written == model.config.eos_token_id).any(dim=1).all(), "a text did not end"
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def why_wrong(prompt: str, written: str) -> str | None:
    try:
        stories.check(prompt + written)
    except stories.GrammarError as error:
        return str(error)
    return None


def test_the_folder_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert needed | {"chat_template.jinja", "task_prompts.json", "README.md"} == files.keys()
    assert sum(files.values()) <= 4_000_000


def test_the_weights_are_float32_and_the_heads_are_grouped(model) -> None:
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    config = model.config
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert config.vocab_size == model.get_input_embeddings().num_embeddings


def test_a_text_gets_one_bos_and_comes_back(tokenizer, model) -> None:
    text = 'Once upon a time, there was an owl named Zoë. "Hello!" said the 3 owls.\n'
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == model.config.vocab_size
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_chat_gets_one_bos(tokenizer) -> None:
    messages = stories.write_conversation(random.Random(0))
    ids = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == len(messages) // 2 - 1
    assert tokenizer.decode(ids).endswith("\nAssistant:")


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_sentences_follow_the_grammar_on_held_out_prompts(model, tokenizer, how: str) -> None:
    documents = list(stories.write_documents("story", COUNT, seed=100, held_out=True))
    set_seed(0)
    sampling = {"do_sample": True, "temperature": 0.7} if how == "sampled" else {"do_sample": False}
    written = complete(model, tokenizer, [document.prompt for document in documents], **sampling)
    counts = [stories.count_sentences(d.prompt + text) for d, text in zip(documents, written, strict=True)]
    known, total = (sum(column) for column in zip(*counts, strict=True))
    assert known >= 0.99 * total, f"{known} of {total} passages follow the grammar"


# Right means: every sentence of the grammar and true to the story's own facts; the one right answer; a summary of that story.
# With 100 prompts of each, 99, 92 and 100 % were.
@pytest.mark.parametrize(("form", "rate"), [("story", 0.95), ("question", 0.85), ("summary", 0.95)])
def test_facts_are_kept_on_held_out_prompts(model, tokenizer, form: str, rate: float) -> None:
    documents = list(stories.write_documents(form, COUNT, seed=100, held_out=True))
    written = complete(model, tokenizer, [document.prompt for document in documents], do_sample=False)
    wrong = [why_wrong(d.prompt, text) for d, text in zip(documents, written, strict=True)]
    assert wrong.count(None) >= rate * COUNT, [why for why in wrong if why]


def test_word_salad_does_not_follow_the_grammar() -> None:
    text = next(iter(stories.write_documents("story", 1, seed=100, held_out=True))).text
    known, total = stories.count_sentences(text)
    assert known == total > 3
    assert stories.count_sentences(" ".join(reversed(text.split())))[0] == 0
