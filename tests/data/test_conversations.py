"""Conversations: what the template writes, with one BOS, and of it the assistant's words are learnt, and no others."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from llama_fast.data.bpe import CHAT_TEMPLATE, BpeConfig, train_tokenizer
from llama_fast.data.conversations import Conversations, tokenised
from llama_fast.decoder.tokenizer import Tokenizer
from llama_fast.engine.llm import EMBEDDED_MODEL
from tests.parity import not_interpreted

pytestmark = not_interpreted

MESSAGES = [
    dict(role="user", content="Hi é🙂"),
    dict(role="assistant", content=" A dog 🙂!\n"),
    dict(role="user", content="And?"),
    dict(role="assistant", content="A cat."),
]
WRITTEN = "<s>User: Hi é🙂\nAssistant:  A dog 🙂!\n</s>\nUser: And?\nAssistant: A cat.</s>\n"
CHATML = (
    "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
MARKED = (
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{{ '\n' }}"
)
FORGETS = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }};{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes a tokenizer of bytes with a chat template."""

    def make(name, template, **options) -> Tokenizer:
        folder = tmp_path_factory.mktemp("tokenizers") / name
        return train_tokenizer(
            ["a dog and a cat"], folder, BpeConfig(vocab_size=262, chat_template=template, **options)
        )

    return make


def learnt(conversation, tokenizer):
    """The text of each stretch of learnt tokens."""
    parts, ids = [[]], conversation.ids.tolist()
    for i, is_learnt in enumerate(conversation.is_learnt):
        if is_learnt:
            parts[-1].append(ids[i])
        elif parts[-1]:
            parts.append([])
    return [tokenizer.decode(part, skip_special=False) for part in parts if part]


@pytest.mark.parametrize("ours", ["embedded model", "trained here"])
def test_marks_in_the_template_say_what_is_learnt(ours, make):
    tokenizer = Tokenizer(EMBEDDED_MODEL) if ours == "embedded model" else make("bpe", CHAT_TEMPLATE)
    conversation = tokenised(dict(messages=MESSAGES), tokenizer)
    assert conversation.ids.tolist() == tokenizer.chat(MESSAGES, add_generation_prompt=False)
    assert conversation.ids.tolist().count(tokenizer.bos_id) == 1
    before, end = (" ", "</s>") if ours == "embedded model" else ("", "<|end_of_text|>")
    assert learnt(conversation, tokenizer) == [f"{before} A dog 🙂!\n{end}", f"{before}A cat.{end}"]


def test_marks_in_the_embedded_template_change_no_text():
    """Beside transformers, which has its own way to them."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    template = tokenizer.chat_template
    unmarked = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert unmarked != template
    for prompt in (True, False):
        texts = [
            tokenizer.apply_chat_template(MESSAGES, chat_template=each, tokenize=False, add_generation_prompt=prompt)
            for each in (template, unmarked)
        ]
        assert texts[0] == texts[1] == Tokenizer(EMBEDDED_MODEL).render_chat(MESSAGES, prompt)
        assert texts[0] == WRITTEN + "Assistant:" * prompt
    theirs = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    ours = tokenised(dict(messages=MESSAGES), Tokenizer(EMBEDDED_MODEL))
    assert theirs["input_ids"] == ours.ids.tolist()
    assert theirs["assistant_masks"] == ours.is_learnt.astype(int).tolist()


def test_without_marks_it_is_what_an_answer_adds(make):
    """Up to its end token: the line break that the template writes after it is not learnt."""
    tokenizer = make("chatml", CHATML, add_bos=False)
    conversation = tokenised(dict(messages=MESSAGES), tokenizer)
    assert learnt(conversation, tokenizer) == [" A dog 🙂!\n<|end_of_text|>", "A cat.<|end_of_text|>"]
    marked = CHATML.replace("{{ m['content'] }}{{ eos_token }}\n", MARKED)
    same = tokenised(dict(messages=MESSAGES), make("marked", marked, add_bos=False))
    assert (same.ids == conversation.ids).all() and (same.is_learnt == conversation.is_learnt).all()


def test_a_template_that_forgets_is_refused(make):
    with pytest.raises(
        ValueError, match=r"writes messages otherwise when the conversation goes on: mark .* generation %"
    ):
        tokenised(dict(messages=MESSAGES), make("forgets", FORGETS))
    with pytest.raises(ValueError, match=r"hold U\+FDD0"):
        tokenised(dict(prompt="a\ufdd0", response="b"), Tokenizer(EMBEDDED_MODEL))


def test_prompt_and_response(make):
    """As a conversation where there is a template, else one after the other; a BOS and an end token in either."""
    chat, plain = Tokenizer(EMBEDDED_MODEL), make("plain", None)
    pair = dict(prompt="a dog", response=" and")
    asked = [dict(role="user", content="a dog"), dict(role="assistant", content=" and")]
    assert (tokenised(pair, chat).ids == tokenised(dict(messages=asked), chat).ids).all()
    conversation = tokenised(pair, plain)
    assert plain.decode(conversation.ids.tolist(), skip_special=False) == "<|begin_of_text|>a dog and<|end_of_text|>"
    assert learnt(conversation, plain) == [" and<|end_of_text|>"]


@pytest.fixture
def file(tmp_path):
    def write(*values):
        path = tmp_path / "chats.jsonl"
        path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in values))
        return path

    return write


def test_what_is_cut_and_left_out_is_counted(make, file):
    tokenizer = make("bytes", None)
    pairs = [
        dict(prompt="abc", response="de"),
        dict(prompt="ab", response="x" * 20),
        dict(prompt="z" * 12, response="y"),
    ]
    found = Conversations(file(pairs[0], "", *pairs[1:]), tokenizer, longest=10)
    assert len(found) == 2 and found.lengths().tolist() == [7, 10] and found.tokens == 17
    assert (found.cut, found.left_out, found.learnt) == (1, 1, 3 + 7)
    assert "2 conversations, 10 of 17 tokens are learnt, 1 cut at 10 tokens, 1 left out" in str(found)
    assert found.is_learnt(0, 1, 7).tolist() == [False] * 3 + [True] * 3
    assert found.count_learnt(0, 1, 5) == 1 and found.count_learnt(1, 5, 10) == 5
    assert tokenizer.decode(found.judged(0).tolist()) == "de"
    with pytest.raises(ValueError, match="no conversation with an answer in its first 2 tokens"):
        Conversations(file(*pairs), tokenizer, longest=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "chats.jsonl:2: Expecting property name"),
        ('{"text": "a"}', "chats.jsonl:2: must be an object with 'messages', or with 'prompt' and 'response'"),
        ('{"prompt": "a", "response": null}', "chats.jsonl:2: 'prompt' and 'response' must be strings"),
        ('{"messages": "a"}', "chats.jsonl:2: messages must be a list"),
        ('{"messages": [{"content": "a"}]}', r"chats.jsonl:2: messages\[0\] must have a 'role'"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "chats.jsonl:2: .* knows only the roles user and assistant"),
    ],
)  # fmt: skip
def test_a_line_that_is_none_is_named(file, line, message):
    with pytest.raises(ValueError, match=message):
        Conversations(file(dict(prompt="a", response="b"), line), Tokenizer(EMBEDDED_MODEL), longest=64)


def test_no_template_for_messages(tmp_path):
    shutil.copy(EMBEDDED_MODEL / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        tokenised(dict(messages=MESSAGES), Tokenizer(tmp_path))
