"""Tasks on the embedded model, and on such as only a chat's messages show."""

import functools
import json
import shutil

import pytest
from transformers import pipeline

import llama_fast
from llama_fast import LLM, SamplingParams
from llama_fast.data import stories
from llama_fast.engine import EMBEDDED_MODEL
from tests.parity import not_interpreted

pytestmark = not_interpreted


@functools.cache
def engine() -> LLM:
    return LLM(progress=False, dtype="float32")


@functools.cache
def told(form: str, count: int = 4) -> list[stories.Document]:
    return list(stories.write_documents(form, count, seed=0, held_out=True))


def parts(prompt: str) -> tuple[str, str]:
    """The story and the question of a document's prompt."""
    story, _, rest = prompt.removeprefix("Story: ").partition("\n")
    return story, rest.removeprefix("Question: ").partition("\n")[0]


@pytest.fixture
def asked(monkeypatch):
    """The prompts of every call of `generate`, as text; what is returned is made of them by a function that a test may set."""
    seen: list[list[str]] = []
    real = LLM.generate

    def generate(self, prompts, params=None):
        seen.append([self.tokenizer.decode(each, skip_special=False) for each in prompts])
        return real(self, prompts, params)

    monkeypatch.setattr(LLM, "generate", generate)
    return seen


def model_without(tmp_path, *names):
    folder = shutil.copytree(EMBEDDED_MODEL, tmp_path / "model")
    for name in names:
        (folder / name).unlink()
    return folder


def test_the_embedded_model_answers_and_sums_up_in_the_words_it_was_trained_on():
    pairs = [parts(document.prompt) for document in told("question")]
    answers = llama_fast.answer(engine(), [question for _, question in pairs], [story for story, _ in pairs])
    assert answers == [document.completion.strip() for document in told("question")]
    (summary,) = llama_fast.summarize(engine(), pairs[0][0])
    stories.check(f"Story: {pairs[0][0]}\nSummary: {summary}")


@pytest.mark.parametrize("prompt", ["Once upon a time", "Story: Mia the owl went to the river.\nSummary:"])
def test_complete_gives_the_greedy_text_of_transformers_pipeline(prompt):
    write = pipeline("text-generation", model=str(EMBEDDED_MODEL), device="cpu")
    (theirs,) = write(prompt, max_new_tokens=64, do_sample=False, return_full_text=False)
    params = SamplingParams(temperature=0, max_tokens=64)
    assert llama_fast.complete(engine(), [prompt], params=params) == [theirs["generated_text"]]
    assert len(theirs["generated_text"]) > 20


def test_a_prompt_is_a_message_where_there_is_a_chat_template(asked, tmp_path):
    """Unless the folder says what the model was trained on, and in a plain form where there is no template."""
    llama_fast.summarize(engine(), ["A fox."], max_tokens=1)
    chat = LLM(model_without(tmp_path / "a", "task_prompts.json"), progress=False)
    llama_fast.summarize(chat, ["A fox."], max_tokens=1)
    llama_fast.summarize(chat, ["A fox."], max_tokens=1, prompt="Shorten {text} twice.")
    plain = LLM(model_without(tmp_path / "b", "task_prompts.json", "chat_template.jinja"), progress=False)
    llama_fast.summarize(plain, ["A fox."], max_tokens=1)
    llama_fast.translate(plain, ["A fox."], target="German")
    llama_fast.answer(plain, ["Who?"], ["A fox."], max_tokens=1)
    bos = plain.tokenizer.decode(plain.tokenizer.encode(""), skip_special=False)
    assert [prompts[0].removeprefix(bos) for prompts in asked] == [
        "Story: A fox.\nSummary:",
        "User: Summarize this text in one or two sentences:\n\nA fox.\nAssistant:",
        "User: Shorten A fox. twice.\nAssistant:",
        "Text: A fox.\nSummary:",
        "English: A fox.\nGerman:",
        "A fox.\nQuestion: Who?\nAnswer:",
    ]


def test_a_long_text_is_summed_up_in_parts_that_are_summed_up(asked):
    several = [parts(document.prompt)[0] for document in told("question", 8)]
    short, (long, summary) = several[0], ("\n\n".join(several), None)
    first, summary = llama_fast.summarize(engine(), [short, long])
    assert [first] == llama_fast.summarize(engine(), short)
    *levels, last, _ = asked
    texts = [prompt.partition("Story: ")[2].removesuffix("\nSummary:") for prompt in levels[0]]
    assert "".join(texts) == long and len(texts) >= 2, "every part once, and nothing of the short text"
    assert len(last) == 2 and summary and "\n" not in summary
    partial = llama_fast.summarize(engine(), texts)
    assert "\n".join(partial) in last[1], "in the order of the parts"


def test_the_order_of_sentences_and_the_shape_of_a_text_stay(monkeypatch):
    """Each piece of a translation is where its source is, between the same spaces and line breaks."""
    llm = engine()
    line = " ".join(f"The fox {i} sat by the river and saw a bird." for i in range(60))
    text = f"  Title\n\n{line}\n\tEnd. \n"
    real = LLM.generate
    lengths: list[int] = []

    def shouted(self, prompts, params):
        lengths.extend(map(len, prompts))
        done = real(self, prompts, [SamplingParams(temperature=0, max_tokens=1) for _ in params])
        for each, prompt in zip(done, prompts, strict=True):
            said = self.tokenizer.decode(prompt).partition("French: ")[2].partition(" :")[0]
            each.text = f' "{said.upper()}"\nThat is French.'
        return done

    monkeypatch.setattr(LLM, "generate", shouted)
    (found,) = llama_fast.translate(llm, text, target="French", prompt="{target}: {text} :")
    assert found == text.upper()
    assert len(lengths) > 4 and max(lengths) <= llm.longest // 3 + 40


def test_an_answer_is_the_likeliest_of_all_windows(monkeypatch):
    llm = engine()
    context = " ".join(f"Bird {i} sat on the fence near the old bridge." for i in range(100)) + " The key is red."
    real = LLM.generate

    def sure_where_the_key_is(self, prompts, params):
        done = real(self, prompts, params)
        for each, prompt in zip(done, prompts, strict=True):
            knows = "key is red" in self.tokenizer.decode(prompt)
            each.text, each.logprobs = (" red", each.logprobs[:1] * 3) if knows else (" no", each.logprobs[:1])
            object.__setattr__(each.logprobs[0], "logprob", -0.1 if knows else -0.2)
            each.token_ids = [0] * len(each.logprobs)
        assert len(done) > 3
        return done

    monkeypatch.setattr(LLM, "generate", sure_where_the_key_is)
    assert llama_fast.answer(llm, "What is red?", context) == ["red"], "its sum is -0.3, its mean -0.1"


def test_no_words_are_taken_only_where_no_window_has_any(monkeypatch):
    context = " ".join(f"Bird {i} sat on the fence near the old bridge." for i in range(100))
    real = LLM.generate

    def silent_but_for_the_first(self, prompts, params):
        done = real(self, prompts, params)
        for i, each in enumerate(done):
            each.text, each.token_ids = ("" if i else " red"), [0]
            each.logprobs = each.logprobs[:1]
            object.__setattr__(each.logprobs[0], "logprob", -0.1 if i else -3.0)
        return done

    monkeypatch.setattr(LLM, "generate", silent_but_for_the_first)
    assert llama_fast.answer(engine(), "What is red?", context) == ["red"]


@pytest.mark.parametrize(
    ("source", "said", "kept"),
    [
        ("Yes.", '"Oui."', "Oui."),
        ("Yes.", "« Oui. »", "Oui."),
        ('"Yes."', '"Oui."', '"Oui."'),
        ('The words "yes" and "no"', '"Oui" et "non"', '"Oui" et "non"'),
        ("It", '"', '"'),
    ],
)
def test_quotes_around_a_whole_translation_go(monkeypatch, source, said, kept):
    real = LLM.generate

    def generate(self, prompts, params):
        done = real(self, prompts, [SamplingParams(max_tokens=1)] * len(prompts))
        done[0].text = said
        return done

    monkeypatch.setattr(LLM, "generate", generate)
    assert llama_fast.translate(engine(), source, target="French") == [kept]


def test_a_prompt_may_have_its_text_twice():
    """Then a part may be half as long."""
    story = " ".join(f"Bird {i} sat on the fence near the old bridge." for i in range(100))
    form = "Story: {text}\nAgain: {text}\nSummary:"
    assert len(llama_fast.summarize(engine(), story, max_tokens=30, prompt=form)) == 1


def test_a_summary_that_is_cut_off_ends_with_a_sentence():
    story, _ = parts(told("question", 1)[0].prompt)
    (whole,) = llama_fast.summarize(engine(), story)
    first = whole.partition(". ")[0] + "."
    tokens = len(engine().tokenizer.encode(first, bos=False))
    assert llama_fast.summarize(engine(), story, max_tokens=tokens + 3) == [first] != [whole]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llama_fast.summarize(llm, ["a", " "]), r"texts\[1\] must be a text that is not empty, got ' '"),
        (lambda llm: llama_fast.complete(llm, ["a", 3]), r"texts\[1\] must be a text that is not empty, got 3"),
        (lambda llm: llama_fast.answer(llm, ["a", "b"], ["c"]), "got 2 questions and 1 contexts"),
        (lambda llm: llama_fast.summarize(llm, ["a"], prompt="Sum up"), r"must have \{text\}, and no other"),
        (lambda llm: llama_fast.summarize(llm, ["a"], prompt="{text} {x}"), r"must have \{text\}, and no other"),
        (lambda llm: llama_fast.answer(llm, "a", "b", prompt="{question}"), r"must have \{question\} and \{context\}"),
        (lambda llm: llama_fast.summarize(llm, ["a"], prompt="{text} {"), "a brace that is none of a field is doubled"),
        (lambda llm: llama_fast.summarize(llm, ["cat " * 900], max_tokens=200), "max_tokens must be at most 7"),
        (lambda llm: llama_fast.answer(llm, ["who " * 480], ["cat " * 900]), "give a shorter prompt, or a lower"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(engine())


@pytest.mark.parametrize("content", ["{", "[]", '{"sing": "x"}', '{"summarize": 3}'])
def test_a_wrong_file_of_prompts_is_named(content, tmp_path):
    folder = model_without(tmp_path)
    (folder / "task_prompts.json").write_text(content)
    with pytest.raises(ValueError, match=r"task_prompts.json (is not JSON|must hold a JSON object with prompts for)"):
        llama_fast.summarize(LLM(folder, progress=False), ["a"])


def test_the_prompts_of_the_embedded_model_are_those_of_its_card():
    forms = json.loads((EMBEDDED_MODEL / "task_prompts.json").read_text())
    (document,) = told("question", 1)
    story, question = parts(document.prompt)
    assert forms["answer"].format(context=story, question=question) == document.prompt
    assert forms["summarize"].format(text=story).startswith(f"Story: {story}\nSummary:")


def test_no_texts_no_outputs():
    assert llama_fast.summarize(engine(), []) == llama_fast.complete(engine(), []) == []
