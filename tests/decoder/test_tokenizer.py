"""Tokens, chats and streamed text as transformers has them, for each kind of tokenizer that LLaMA-like models come with."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

import llama_fast
from llama_fast.decoder.tokenizer import DetokenizedStream, StopStrings, Tokenizer

REPOSITORY = Path(llama_fast.__file__).parent.parent
EMBEDDED = REPOSITORY / "llama_fast" / "demo_model"
DREAM = REPOSITORY.parent / "shared" / "checkpoints" / "dream-260k"

SAMPLES = [
    "Once upon a time, there was a small owl. It didn't sleep.",
    "  two spaces, a tab\tand\n\n lines ",
    "naïve café, 你好世界, 한국어, 🦙👩‍👩‍👧 ok",
    "",
    " ",
    "a",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = """\
{{ bos_token }}{% for m in messages %}
    {%- if m.role not in ['user', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}
    {% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{% endgeneration %}{{ eos_token }}
    {% else %}[{{ m | tojson }}]{% endif %}
    {% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}{% if add_generation_prompt %}>>{{ strftime_now('%Y') }}{{ tools is none }}{% endif %}"""


def with_bos(backend: Backend) -> Backend:
    template = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", backend.token_to_id("<s>"))]}
    backend.post_processor = processors.TemplateProcessing(**template)
    return backend


def byte_level() -> Backend:
    """As Llama 3, Qwen and the embedded model: BPE on bytes, so that one character may be several tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(SAMPLES[:2] * 3, trainer)
    return with_bos(backend)


def words() -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges of a BPE on characters, with ▁ for a space."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=80, show_progress=False)
    backend.train_from_iterator(SAMPLES[:1] * 3 + ["▁▁▁"], trainer)
    model = json.loads(backend.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def llama2() -> Backend:
    """As Llama 2's `tokenizer.json`: BPE on characters, bytes for unknown ones, a space before the text that decoding strips."""
    pieces, merges = words()
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strip)
    return with_bos(backend)


def unigram() -> Backend:
    """As sentencepiece's Unigram models: Metaspace before the model and as the decoder, bytes for unknown characters."""
    pieces, _ = words()
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [(token, -float(i) / len(tokens)) for i, token in enumerate(tokens)]
    backend = Backend(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return with_bos(backend)


MADE = {"byte-level": byte_level, "llama-2": llama2, "unigram": unigram}


def write(folder: Path, backend: Backend, **config) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=[*MADE, "embedded", "dream-260k"])
def folder(request, tmp_path_factory) -> Path:
    if request.param == "embedded":
        return EMBEDDED
    if request.param == "dream-260k":
        if not DREAM.is_dir():
            pytest.skip("the checkpoint dream-260k is not beside this repository")
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


def test_tokens_only_the_config_declares_are_read(tmp_path) -> None:
    declared = {"content": "<|turn|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    backend = byte_level()
    size = backend.get_vocab_size()
    folder = write(tmp_path, backend, added_tokens_decoder={str(size): declared | {"single_word": False}})
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("a<|turn|>b") == theirs("a<|turn|>b").input_ids
    assert size in ours.special_ids and ours.vocab_size == size + 1 == len(theirs)


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


def streamed(tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int] = (), skip_special: bool = True) -> list[str]:
    stream = DetokenizedStream(tokenizer, prompt_ids, skip_special=skip_special)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


def test_streamed_text_is_the_text_and_comes_without_delay(tokenizer) -> None:
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)
    ids = tokenizer.encode(SAMPLES[0])
    # BOS and the space before the text give none; a byte token waits for the end of its run
    waiting = [token_id for token_id, piece in zip(ids[2:], streamed(tokenizer, ids)[2:], strict=False) if not piece]
    assert set(waiting) <= tokenizer.byte_ids


@given(data=st.data())
def test_any_tokens_streamed_are_the_text_they_decode_to(tokenizer, data) -> None:
    known = [*tokenizer.encode("🦙 two  owls 你"), tokenizer.eos_ids[0]]
    token = st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from(known)
    if tokenizer.byte_ids:
        token |= st.sampled_from(sorted(tokenizer.byte_ids))
    ids = data.draw(st.lists(token, max_size=40))
    skip = data.draw(st.booleans())
    pieces = streamed(tokenizer, ids, skip_special=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


@given(data=st.data())
def test_text_after_a_prompt_goes_on_where_the_prompt_ends(tokenizer, data) -> None:
    prompt = tokenizer.encode(data.draw(st.sampled_from([text for text in SAMPLES if text.strip()])))
    ids = data.draw(st.lists(st.sampled_from(tokenizer.encode(SAMPLES[0] + " 🦙 é")), max_size=30))
    if tokenizer.byte_ids:  # bytes of the prompt's last run and the first of the text would make one run
        ids = [tokenizer.encode("owl")[-1], *ids]
    pieces = streamed(tokenizer, ids, prompt)
    assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode(prompt + ids)


def test_text_after_bos_alone_starts_like_a_text(tokenizer) -> None:
    bos, *ids = tokenizer.encode("owl")
    assert "".join(streamed(tokenizer, ids, [bos])) == "owl"


def test_a_character_comes_whole_with_its_last_byte(tmp_path) -> None:
    ours = Tokenizer(write(tmp_path, byte_level()))
    ids = ours.encode("🦙a")[1:]
    assert len(ids) == 5
    assert streamed(ours, ids) == ["", "", "", "🦙", "a", ""]
    assert streamed(ours, ids[:2]) == ["", "", "\ufffd"]


def test_a_long_stream_looks_at_few_tokens(tokenizer) -> None:
    stream = DetokenizedStream(tokenizer)
    for token_id in tokenizer.encode(SAMPLES[0]) * 5:
        stream.push(token_id)
        assert len(stream._window) <= 8


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_stop_string_is_found_across_pieces(size: int) -> None:
    def feed(text: str, *stops: str) -> tuple[str, str | None]:
        matcher = StopStrings(stops)
        pieces = [matcher.push(text[i : i + size]) for i in range(0, len(text), size)]
        return "".join(pieces) + matcher.flush(), matcher.found

    assert feed("one, two. three", "two", ".") == ("one, ", "two")
    assert feed("aab aaab", "aaab") == ("aab ", "aaab")
    assert feed("no stop: tw", "two") == ("no stop: tw", None)
    assert feed("no stops") == ("no stops", None)
    assert feed("END", "END") == ("", "END")


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["\n\nUser:", "###"])
    assert [matcher.push(piece) for piece in ("a\n", "\nUs", "ed #", "#!", "# x")] == [
        "a",
        "",
        "\n\nUsed ",
        "##!",
        "# x",
    ]
