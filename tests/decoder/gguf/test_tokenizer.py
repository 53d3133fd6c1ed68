"""Ids of texts: those of llama.cpp."""

import json
from pathlib import Path

import pytest

from llama_fast.decoder.tokenizer import Tokenizer
from llama_fast.engine.llm import EMBEDDED_MODEL
from tests.decoder.gguf.files import VOCABULARIES, vocabulary_of, write_vocabulary
from tests.decoder.gguf.llama_cpp import PYTHON, RECORDED, SMOLLM2, llama_cpp_ids
from tests.decoder.gguf.strings import strings
from tests.parity import not_interpreted
from tests.real_model import needs_real_model, real_model

pytestmark = not_interpreted

# 50 strings, and what llama.cpp (llama-cpp-python 0.3.36) makes of them: see `llama_cpp.py`
IDS = json.loads(RECORDED.read_text())
needs_llama_cpp = pytest.mark.skipif(PYTHON is None, reason="LLAMA_CPP_PYTHON names no Python with llama-cpp-python")


def assert_ids(tokenizer: Tokenizer, texts: list[str], expected: list[list[int]]) -> None:
    wrong = [(text, tokenizer.encode(text), ids) for text, ids in zip(texts, expected, strict=True)]
    assert [each for each in wrong if each[1] != each[2]] == []


@pytest.fixture(params=VOCABULARIES)
def vocabulary(request, tmp_path) -> Path:
    return write_vocabulary(tmp_path / f"{request.param}.gguf", request.param)


def test_ids_are_those_of_llama_cpp(vocabulary):
    assert_ids(Tokenizer(vocabulary), IDS["strings"], IDS[vocabulary.stem])


@needs_real_model
def test_ids_of_a_real_vocabulary():
    assert_ids(Tokenizer(real_model()), IDS["strings"], IDS[SMOLLM2])


@needs_llama_cpp
def test_a_thousand_strings(vocabulary):
    texts = strings(1000)
    assert_ids(Tokenizer(vocabulary), texts, llama_cpp_ids(vocabulary, texts))


@needs_llama_cpp
@needs_real_model
def test_a_thousand_strings_of_a_real_vocabulary():
    texts = strings(1000)
    assert_ids(Tokenizer(real_model()), texts, llama_cpp_ids(real_model(), texts))


def test_the_embedded_models_vocabulary(tmp_path):
    """A tokenizer of the tokenizers library, its `tokenizer.json` written as GGUF: the same ids, text and special tokens."""
    own = Tokenizer(EMBEDDED_MODEL)
    stored = json.loads((EMBEDDED_MODEL / "tokenizer.json").read_text())["model"]
    path = write_vocabulary(
        tmp_path / "a.gguf", "gpt-2", tokens=sorted(stored["vocab"], key=stored["vocab"].__getitem__),
        merges=[" ".join(merge) for merge in stored["merges"]], bos_token_id=own.bos_id, eos_token_id=own.eos_ids[0],
        token_type=[3 if i in own.special_ids else 1 for i in range(len(stored["vocab"]))], add_bos_token=True,
    )  # fmt: skip
    tokenizer = Tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (own.bos_id, own.eos_ids)
    assert (tokenizer.special_ids, tokenizer.vocab_size) == (own.special_ids, own.vocab_size)
    for text in IDS["strings"]:
        ids = own.encode(text)
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == own.decode(ids)


def test_a_text_comes_back(vocabulary):
    """Special tokens left out: control tokens are not shown, those that the user defined are."""
    tokenizer = Tokenizer(vocabulary)
    for text in ("Hello  the 123\n\n x", "it's naïve 中文 😀", " a", "a<think>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    marker = "</s>" if vocabulary.stem.startswith("sentencepiece") else "<|im_start|>"
    assert tokenizer.decode(tokenizer.encode(f"a{marker}")) == "a"
    assert tokenizer.decode(tokenizer.encode(f"a{marker}"), skip_special=False).endswith(marker)


@pytest.mark.parametrize(
    ("name", "more", "bos_id"),
    [
        ("llama-bpe", {}, 0), ("llama-bpe", dict(add_bos_token=False), None),
        ("qwen2", {}, None), ("qwen2", dict(add_bos_token=True), 0),
        ("sentencepiece", {}, 1), ("sentencepiece", dict(add_bos_token=False), None), ("sentencepiece", dict(bos_token_id=5), 5),
        ("sentencepiece", dict(add_eos_token=True), 1),
    ],
)  # fmt: skip
def test_how_a_text_begins(name, more, bos_id, tmp_path):
    write_vocabulary(tmp_path / "a.gguf", name, **more)
    tokenizer = Tokenizer(tmp_path / "a.gguf")
    assert tokenizer.bos_id == bos_id
    assert tokenizer.encode("the")[0] == bos_id or bos_id is None
    assert tokenizer.encode("the")[-1] not in tokenizer.eos_ids


def test_what_ends_a_text(tmp_path):
    """What the metadata names, and tokens that are called as such."""
    write_vocabulary(tmp_path / "a.gguf", "qwen2", eos_token_id=7, eot_token_id=9, eom_token_id=11)
    tokenizer = Tokenizer(tmp_path / "a.gguf")
    assert tokenizer.eos_ids[1:4] == (7, 9, 11)
    assert [tokenizer.token(tokenizer.eos_ids[i]) for i in (0, 4)] == ["<|im_end|>", "<|endoftext|>"]


def test_tokens_without_a_text(tmp_path):
    """They stay apart, as in llama.cpp, and are in no text."""
    keys = vocabulary_of("qwen2")
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    path = write_vocabulary(tmp_path / "a.gguf", "qwen2", tokens=[*tokens, "", ""], token_type=[*types, 1, 1])
    tokenizer = Tokenizer(path)
    assert tokenizer.vocab_size == len(tokens) + 2
    assert_ids(tokenizer, IDS["strings"], IDS["qwen2"])


def test_the_chat_template(tmp_path):
    write_vocabulary(
        tmp_path / "a.gguf", "qwen2",
        **{"tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"},
    )  # fmt: skip
    tokenizer = Tokenizer(tmp_path / "a.gguf")
    assert tokenizer.render_chat([{"role": "user", "content": "the"}]) == "<|begin|>the<|im_end|>"
    assert tokenizer.chat([{"role": "user", "content": "the"}])[::2] == [0, 2]
    write_vocabulary(tmp_path / "b.gguf", "qwen2")
    with pytest.raises(ValueError, match=r"b\.gguf has no chat template"):
        Tokenizer(tmp_path / "b.gguf").chat([])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(pre="gpt-5"), r"the tokenizer of .*a\.gguf cannot be built: tokenizer\.ggml\.pre must be one of .*, got 'gpt-5'"),
        (dict(model="bert"), r"tokenizer\.ggml\.model must be gpt2 or llama, got 'bert'"),
        (dict(model=None), r"tokenizer\.ggml\.model must be gpt2 or llama, got None"),
        (dict(merges=None), r"has no tokenizer\.ggml\.merges"),
        (dict(tokens=None), r"has no tokenizer\.ggml\.tokens"),
        (dict(merges=["x yz"]), r"cannot be built: .*out of vocabulary"),
        (dict(tokens=["a", "b", "a"]), r"its token 'a' is there twice"),
        (dict(bos_token_id=99999), r"bos_token_id is 99999, and there are"),
        (dict(model="llama", scores=[0.0] * 3, tokens=["a", "b", "ab"], token_type=[1] * 3), None),
        (
            dict(model="llama", scores=[0.0] * 4, tokens=["a", "b", "ab", "ba"], token_type=[1] * 4),
            "its pieces 'ab' and 'ba' have one score, which is not supported",
        ),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(more, message, tmp_path):
    write_vocabulary(tmp_path / "a.gguf", "qwen2", **dict(bos_token_id=None, eos_token_id=None) | more)
    if message is None:
        assert Tokenizer(tmp_path / "a.gguf").vocab_size == 3
        return
    with pytest.raises(ValueError, match=message):
        Tokenizer(tmp_path / "a.gguf")
