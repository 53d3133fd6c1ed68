"""Tokenizers that are trained: their files, that transformers reads them alike, and that no text is lost."""

import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama_fast.data.bpe import BOS, EOS, PAD, ROLES, BpeConfig, copy_tokenizer, fingerprint, train_tokenizer
from llama_fast.decoder.tokenizer import Tokenizer
from tests.real_model import needs_real_model, real_model

TEXTS = [topics[name] for name in sorted(topics)][:20]
MIXED = [
    "",
    " ",
    "The quick brown fox.",
    "  a\n\n\tb  ",
    "人工智能正在改变世界。",
    "吾輩は猫である。",
    "naïve — “quoted” 🦙\u200d",
    "12345.678",
]
DEMO = Path(__file__).parents[2] / "llama_fast" / "demo_model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bpe") / "tokenizer"
    train_tokenizer(TEXTS, made, BpeConfig(vocab_size=600))
    return made


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


unicode = st.lists(st.one_of(st.text(), st.sampled_from([BOS, EOS, *ROLES, "日本語", "\r\n", "\x00"]))).map("".join)


@given(unicode)
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, bos=False), skip_special=False) == text


@pytest.mark.parametrize("text", MIXED)
def test_transformers_reads_it_alike(folder, tokenizer, text):
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert (
        theirs.decode(tokenizer.encode(text), skip_special_tokens=True)
        == tokenizer.decode(tokenizer.encode(text))
        == text
    )


def test_its_special_tokens(folder, tokenizer):
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, 1, (1,), 600)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token, len(theirs)) == (BOS, EOS, PAD, 600)
    assert set(theirs.all_special_ids) == tokenizer.special_ids == set(range(6))


def test_a_conversation_in_both(folder, tokenizer):
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好\n"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Go on"},
    ]
    read = theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert read["input_ids"] == tokenizer.chat(messages)
    assert tokenizer.render_chat(messages[:2]) == f"{BOS}<|system|>\nBe brief.\n<|user|>\n你好\n\n<|assistant|>\n"
    answer = [i for i, mine in zip(read["input_ids"], read["assistant_masks"], strict=True) if mine]
    assert tokenizer.decode(answer, skip_special=False) == f"Hello{EOS}"  # what a training learns to write
    with pytest.raises(ValueError, match="roles are system, user and assistant, got tool"):
        tokenizer.chat([{"role": "tool", "content": ""}])


def test_options(tmp_path):
    config = BpeConfig(vocab_size=300, add_bos=False, special_tokens=("<|think|>",), chat_template=None)
    ours = train_tokenizer(["some text"], tmp_path / "plain", config)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert ours.encode("a<|think|>") == theirs("a<|think|>")["input_ids"]
    assert ours.bos_id is None and ours.encode("a<|think|>")[-1] == 6 == theirs.convert_tokens_to_ids("<|think|>")
    with pytest.raises(ValueError, match="no chat template"):
        ours.chat([{"role": "user", "content": "Hi"}])


def test_the_same_texts_give_the_same_bytes(folder, tmp_path):
    script = (
        "from pydoc_data.topics import topics; from llama_fast.data.bpe import *;"
        f"train_tokenizer([topics[name] for name in sorted(topics)][:20], {str(tmp_path / 'again')!r}, BpeConfig(vocab_size=600))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_its_fingerprint(folder, tokenizer, tmp_path):
    """It stays when padding, spaces in the file or the template change, and is another when a token is."""
    copied = copy_tokenizer(folder / "tokenizer.json", tmp_path / "copied")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["padding"] = json.loads((DEMO / "tokenizer.json").read_text())["padding"]
    (tmp_path / "copied" / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "copied" / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint(tokenizer) == fingerprint(copied) == fingerprint(Tokenizer(tmp_path / "copied"))
    others = {
        "vocabulary": (TEXTS, BpeConfig(vocab_size=599)),
        "text": (TEXTS[1:], BpeConfig(vocab_size=600)),
        "bos": (TEXTS, BpeConfig(vocab_size=600, add_bos=False)),
    }
    prints = [fingerprint(train_tokenizer(texts, tmp_path / name, config)) for name, (texts, config) in others.items()]
    assert len({fingerprint(tokenizer), *prints}) == 4


def test_an_existing_tokenizer_is_copied(tmp_path):
    copied = copy_tokenizer(DEMO, tmp_path / "copied")
    assert copied.encode("Once upon a time") == Tokenizer(DEMO).encode("Once upon a time")
    assert copied.eos_ids == Tokenizer(DEMO).eos_ids
    assert not (tmp_path / "copied" / "model.safetensors").exists()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        copy_tokenizer(tmp_path, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@needs_real_model
def test_that_of_a_gguf_file_becomes_files(tmp_path):
    source = real_model()
    copied, ours = copy_tokenizer(source, tmp_path / "copied"), Tokenizer(source)
    assert fingerprint(copied) == fingerprint(ours)
    assert (copied.bos_id, copied.eos_id, copied.eos_ids) == (ours.bos_id, ours.eos_id, ours.eos_ids)
    messages = [dict(role="user", content="Hi")]
    assert copied.chat(messages) == ours.chat(messages)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "copied")
    assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ours.chat(messages)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["fine", "half \ud83d a llama"], r"text 1 is not Unicode: its character 5 is '\\ud83d'"),
        ([], "no text to train"),
    ],
)
def test_texts_that_cannot_be(texts, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(iter(texts), tmp_path / "tokenizer")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 261}, "vocab_size must be at least 262"),
        ({"special_tokens": (EOS,)}, "must differ"),
        ({"special_tokens": ("",)}, "none be empty"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        BpeConfig(**options)


def test_what_stands_in_a_folder_is_not_lost(tmp_path):
    """A tokenizer replaces a tokenizer, and nothing else."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="holds other things"):
        train_tokenizer(["text"], tmp_path / "work")
    (tmp_path / "work" / "thesis.tex").unlink()
    first = train_tokenizer(["text"], tmp_path / "work", BpeConfig(chat_template=None))
    second = train_tokenizer(["text", "text and more text"], tmp_path / "work")
    assert fingerprint(first) != fingerprint(second) == fingerprint(Tokenizer(tmp_path / "work"))


def test_lone_surrogates_are_named_when_text_is_encoded(tokenizer):
    with pytest.raises(ValueError, match=r"character 1 is '\\udc80'"):
        tokenizer.encode("a\udc80")
