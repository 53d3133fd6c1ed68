"""Tokens and chats as transformers has them, for each kind of tokenizer that LLaMA-like models come with."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer

import llama_fast
from llama_fast.decoder.tokenizer import Tokenizer
from tests.checkpoints import DREAM, needs_dream
from tests.decoder.made_tokenizers import MADE, SAMPLES, byte_level, llama2, write

REPOSITORY = Path(llama_fast.__file__).parent.parent
EMBEDDED = REPOSITORY / "llama_fast" / "demo_model"

TEMPLATE = """\
{{ bos_token }}{% for m in messages %}
    {%- if m.role not in ['user', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}
    {% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{% endgeneration %}{{ eos_token }}
    {% else %}[{{ m | tojson }}]{% endif %}
    {% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}{% if add_generation_prompt %}>>{{ strftime_now('%Y') }}{{ tools is none }}{% endif %}"""


@pytest.fixture(scope="module", params=[*MADE, "embedded", pytest.param("dream-260k", marks=needs_dream)])
def folder(request, tmp_path_factory) -> Path:
    if request.param == "embedded":
        return EMBEDDED
    if request.param == "dream-260k":
        return DREAM
    return write(tmp_path_factory.mktemp(request.param), MADE[request.param](), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def test_texts_have_the_tokens_transformers_gives_them(tokenizer, theirs) -> None:
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert ids == theirs(text).input_ids
        assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special=False) == theirs.decode(ids)
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (theirs.bos_token_id, len(theirs))
    assert tokenizer.eos_ids == (theirs.eos_token_id,)
    assert tokenizer.special_ids >= set(theirs.all_special_ids)


def test_a_bos_that_the_text_spells_is_the_only_one(tokenizer) -> None:
    ids = tokenizer.encode("<s>a</s>")
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_ids[0]


CHAT = [{"role": "user", "content": "Hi <b>\"'é"}, {"role": "assistant", "content": " yes "}]
CHAT += [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("as_file", [False, True])
def test_chats_are_those_of_transformers(tmp_path, kind: str, as_file: bool) -> None:
    folder = write(tmp_path, MADE[kind](), chat_template="wrong" if as_file else TEMPLATE)
    if as_file:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for messages in (CHAT, CHAT[:1], CHAT * 3):
        for prompt in (False, True):
            ids = ours.chat(messages, prompt)
            assert (
                ids == theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
            )
            assert ids.count(ours.bos_id) == 1
    with pytest.raises(ValueError, match="no role system"):
        ours.chat([{"role": "system", "content": ""}])
    with pytest.raises(ValueError, match=r"messages\[0\]"):
        ours.chat(["hello"])


def test_the_embedded_models_chat_is_that_of_transformers() -> None:
    ids = Tokenizer(EMBEDDED).chat(CHAT)
    assert (
        ids
        == AutoTokenizer.from_pretrained(EMBEDDED).apply_chat_template(
            CHAT, add_generation_prompt=True, return_dict=True
        )["input_ids"]
    )


def test_a_template_without_bos_gets_one_and_a_model_without_bos_gets_none(tmp_path) -> None:
    folder = write(tmp_path, byte_level(), chat_template="{{ messages[0].content }}")
    assert Tokenizer(folder).chat(CHAT)[0] == 1
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.ByteLevel()
    write(tmp_path, backend)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.bos_id is None
    assert ours.encode("a owl") == theirs("a owl").input_ids
    with pytest.raises(ValueError, match="no chat template"):
        ours.chat(CHAT)


def test_a_named_template_and_a_template_that_is_none(tmp_path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ eos_token }}{{ extra }}"}]
    ours = Tokenizer(write(tmp_path, byte_level(), chat_template=named))
    assert ours.render_chat(CHAT, extra="!") == "</s>!"
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer(write(tmp_path, byte_level(), chat_template="{% if %}"))


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path) -> None:
    ours = Tokenizer(write(tmp_path, byte_level(), chat_template="{{ messages.__class__.__mro__ }}"))
    with pytest.raises(ValueError, match="refuses"):
        ours.chat(CHAT)


def test_end_tokens_are_the_tokenizers_and_the_generation_configs(tmp_path) -> None:
    folder = write(tmp_path, byte_level())
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer(folder).eos_ids == (2, 7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert Tokenizer(folder).eos_ids == (2, 9)
    (folder / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
    assert Tokenizer(folder).eos_ids == (2, 9)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<unk>"}')
    assert Tokenizer(folder).eos_ids == (0, 2, 9)


def test_one_wrong_byte_does_not_spoil_its_run(tmp_path) -> None:
    """As sentencepiece reads it: U+FFFD for each byte that is part of no character, and for no other."""
    ours = Tokenizer(write(tmp_path, llama2()))

    def text(spelled: bytes) -> str:
        return ours.decode([ours.encode("a")[-1], *(3 + byte for byte in spelled)])

    assert text("ไทย".encode()) == "aไทย"
    assert text("ไทย".encode()[:-1]) == "aไท\ufffd\ufffd"
    assert text("ไทย".encode()[1:]) == "a\ufffd\ufffdทย"
    assert text(b"\xff\xe0\xb8A\xed\xa0\x80\xf0\x9f\xa6\x99") == "a\ufffd\ufffd\ufffdA\ufffd\ufffd\ufffd🦙"
    ids = [3 + 0xF0, 2, *(3 + byte for byte in b"\x9f\xa6\x99")]
    assert ours.decode(ids) == "🦙" and ours.decode(ids, skip_special=False) == "\ufffd</s>\ufffd\ufffd\ufffd"


def test_a_text_that_is_not_unicode(tmp_path) -> None:
    text = b"ab\xffc".decode(errors="surrogateescape")
    with pytest.raises(ValueError, match="the text is not UTF-8: its character 2 is"):
        Tokenizer(write(tmp_path, byte_level())).encode(text)


def test_a_folder_that_cannot_be_used_says_why(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json: copy it"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match="save_pretrained"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="'<start>' is not in the vocabulary"):
        Tokenizer(write(tmp_path, byte_level(), bos_token="<start>"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer(tmp_path)


def test_what_the_file_says_of_padding_and_truncation_is_not_followed(tmp_path) -> None:
    backend = byte_level()
    backend.enable_padding(length=50)
    backend.enable_truncation(3)
    assert len(Tokenizer(write(tmp_path, backend)).encode("?" * 10)) == 11
