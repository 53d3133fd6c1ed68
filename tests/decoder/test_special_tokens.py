"""Special tokens that stand in other files than `tokenizer.json`, as transformers' AutoTokenizer reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from llama_fast.decoder.tokenizer import Tokenizer
from tests.decoder.made_tokenizers import MADE, byte_level, write

TURN, IMAGE, CALL = "<|turn|>", "<|image|>", "<|call|>"
TEXT = f"a{TURN}b {IMAGE}{CALL} c"
IN_MAP: dict[str, Any] = {"content": TURN, "lstrip": False, "rstrip": True, "normalized": False, "single_word": False}

# name: (tokenizer_config.json, special_tokens_map.json, added_tokens.json), {n} being the size of the vocabulary
DECLARED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "a list of the config": ({"additional_special_tokens": [TURN, CALL]}, {}, {}),
    "its new name": ({"extra_special_tokens": [TURN, CALL]}, {}, {}),
    "named extra ones": ({"extra_special_tokens": {"image_token": IMAGE, "call": CALL}}, {}, {}),
    "a list and named ones": (
        {"additional_special_tokens": [TURN], "extra_special_tokens": {"image_token": IMAGE}},
        {},
        {},
    ),
    "a name of its own": ({"image_token": IMAGE}, {}, {}),
    "another name of those there are": ({"pad_token": TURN}, {}, {}),
    "a list of the map": ({}, {"additional_special_tokens": [TURN, CALL]}, {}),
    "its new name in the map": ({}, {"extra_special_tokens": [IN_MAP, CALL]}, {}),
    "a name of the map": ({}, {"pad_token": IN_MAP}, {}),
    "the map before the config": ({"pad_token": CALL}, {"pad_token": TURN}, {}),
    "added tokens": ({}, {}, {CALL: 1, TURN: 0}),
    "added tokens with names": ({"pad_token": TURN}, {}, {CALL: 1, TURN: 0}),
    "added tokens, listed": ({"additional_special_tokens": [CALL]}, {}, {CALL: 0, IMAGE: 1}),
    "an end token that is added": ({}, {"eos_token": CALL}, {CALL: 0}),
    "the decoder says all": (
        {"added_tokens_decoder": {"400": {"content": CALL, "special": True}}},
        {"pad_token": TURN},
        {IMAGE: 0},
    ),
    "the decoder, and a list": (
        {
            "added_tokens_decoder": {
                "401": {"content": CALL, "special": False},
                "400": {"content": TURN, "special": True},
            },
            "additional_special_tokens": [IMAGE],
            "pad_token": CALL,
        },
        {},
        {},
    ),
}


def folder_of(folder: Path, backend: Any, declared: tuple[dict[str, Any], ...]) -> Path:
    config, special_map, added = declared
    size = backend.get_vocab_size()
    write(folder, backend, **config)
    (folder / "special_tokens_map.json").write_text(json.dumps(special_map))
    (folder / "added_tokens.json").write_text(json.dumps({token: size + i for token, i in added.items()}))
    return folder


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("name", DECLARED)
def test_tokens_are_known_as_transformers_knows_them(tmp_path, kind: str, name: str) -> None:
    backend = MADE[kind]()
    size = backend.get_vocab_size()
    folder = folder_of(tmp_path, backend, DECLARED[name])
    assert_as_theirs(folder, TEXT)
    if (
        kind == "byte-level"
    ):  # other kinds have a space before the text, and a token that is no special one then is another text
        assert max(Tokenizer(folder).encode(TEXT)) >= size


def assert_as_theirs(folder: Path, text: str) -> None:
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("special", [False, True])
def test_the_config_says_how_a_token_is_treated_that_is_added_already(tmp_path, special: bool) -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken(TURN, special=False)])
    flags = {"content": TURN, "special": special, "normalized": False, "lstrip": True}
    folder = write(tmp_path, backend, added_tokens_decoder={"330": flags})
    assert_as_theirs(folder, TEXT + f"  {TURN}")
    assert (TURN in Tokenizer(folder).decode(Tokenizer(folder).encode(TEXT))) is not special


def test_a_listed_token_that_is_also_added_is_special(tmp_path) -> None:
    """In `special_tokens_map.json` too, where the transformers of today takes it for an ordinary one, and older ones did not."""
    folder = folder_of(tmp_path, byte_level(), ({}, {"additional_special_tokens": [TURN]}, {TURN: 0}))
    ours = Tokenizer(folder)
    assert ours.decode(ours.encode(f"a{TURN}b")) == "ab"


def test_an_ordinary_token_of_the_vocabulary_that_is_named_is_special(tmp_path) -> None:
    """It keeps its id, and a text that spells it has it as one token."""
    backend = byte_level()
    backend.add_tokens(["x"])
    ours = Tokenizer(write(tmp_path, backend, unk_token="owl", mask_token="t"))
    token = backend.token_to_id("t")
    assert token in ours.special_ids and ours.decode(ours.encode("atb")) == "ab"


def test_templates_know_named_tokens(tmp_path) -> None:
    config = {"extra_special_tokens": {"image_token": IMAGE}, "chat_template": "{{ image_token }}{{ pad_token }}"}
    folder = folder_of(tmp_path, byte_level(), (config, {"pad_token": IN_MAP}, {}))
    messages = [{"role": "user", "content": ""}]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (
        Tokenizer(folder).render_chat(messages) == theirs.apply_chat_template(messages, tokenize=False) == IMAGE + TURN
    )


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_start_or_end_token_must_have_an_id(tmp_path, name: str) -> None:
    with pytest.raises(ValueError, match="the special token '<new>' is not in the vocabulary"):
        Tokenizer(folder_of(tmp_path, byte_level(), ({name: "<new>"}, {}, {})))
    folder_of(tmp_path, byte_level(), ({name: "<new>"}, {}, {"<new>": 0}))
    assert Tokenizer(tmp_path).encode("<new>")[-1] == byte_level().get_vocab_size()
