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
    assert needed | {"chat_template.jinja", "README.md"} == files.keys()
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


# At least this share of the completions of 40 held-out prompts: for a story and a summary "right" is of the grammar and true to
# its own facts; for a question it is the one right answer.
@pytest.mark.parametrize(("form", "rate"), [("story", 0.95), ("question", 0.9), ("summary", 0.95)])
@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_held_out_prompts(model, tokenizer, form: str, rate: float, how: str) -> None:
    documents = list(stories.write_documents(form, COUNT, seed=100, held_out=True))
    set_seed(0)
    sampling = {"do_sample": True, "temperature": 0.7} if how == "sampled" else {"do_sample": False}
    written = complete(model, tokenizer, [document.prompt for document in documents], **sampling)
    wrong = [why_wrong(d.prompt, text) for d, text in zip(documents, written, strict=True)]
    right = wrong.count(None) / COUNT
    assert right >= rate, f"{right:.0%} right; wrong: {[why for why in wrong if why]}"


def test_stories_from_two_words(model, tokenizer) -> None:
    set_seed(0)
    prompts = ["Once upon", "There once", "Once there"] * 10
    written = complete(model, tokenizer, prompts, do_sample=True, temperature=0.7)
    assert len(set(written)) == len(written), "samples repeat each other"
    wrong = [why for prompt, text in zip(prompts, written, strict=True) if (why := why_wrong(prompt, text))]
    assert len(wrong) <= 3, wrong


def test_chats_about_held_out_worlds(model, tokenizer) -> None:
    rng = random.Random(12)
    chats = [stories.write_conversation(rng, held_out=True, turns=2) for _ in range(COUNT)]
    for asked in (1, 3, 5):  # the request, then two questions; each time after the right history
        prompts = [
            tokenizer.apply_chat_template(chat[:asked], tokenize=False, add_generation_prompt=True) for chat in chats
        ]
        plain = [prompt.removeprefix(tokenizer.bos_token) for prompt in prompts]
        written = complete(model, tokenizer, plain, do_sample=False)
        right = 0
        for chat, text in zip(chats, written, strict=True):
            try:
                stories.check_conversation([*chat[:asked], {"role": "assistant", "content": text.strip()}])
                right += 1
            except stories.GrammarError:
                pass
        assert right / COUNT >= 0.9, f"turn {asked}: {right} of {COUNT}"
