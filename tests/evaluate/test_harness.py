"""lm-eval on our engine: the log-likelihoods and outputs of its own `hf` model, and its tasks without a network."""

import json

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from typer.testing import CliRunner

from llama_fast.cli.main import app
from llama_fast.data import stories
from llama_fast.engine.llm import EMBEDDED_MODEL
from llama_fast.evaluate.harness import HarnessLM
from llama_fast.evaluate.result import Evaluation
from llama_fast.reports.jsonfile import read_json
from tests.parity import not_interpreted

pytestmark = not_interpreted

QUESTIONS = list(stories.write_documents("question", 6, seed=3, held_out=True))


@pytest.fixture(scope="module")
def ours(llm):
    return HarnessLM(llm)


@pytest.fixture(scope="module")
def peer(ours):
    return HFLM(pretrained=str(EMBEDDED_MODEL), device="cpu", dtype="float32", batch_size=4, max_length=ours.max_length)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def test_loglikelihoods_are_those_of_hf(ours, peer):
    pairs = [(each.prompt, each.completion) for each in QUESTIONS]
    pairs += [
        (each.prompt + " ", "The wrong answer.") for each in QUESTIONS[:2]
    ]  # the space belongs to the continuation
    pairs += [("", "Once upon a time"), ("今天", "天气很好"), ("a b " * 600, "c"), ("<s>Once", " upon")]
    asked = requests("loglikelihood", *pairs)
    found, right = ours.loglikelihood(asked), peer.loglikelihood(asked)
    for pair, (logprob, greedy), (expected, expected_greedy) in zip(pairs, found, right, strict=True):
        assert logprob == pytest.approx(expected, rel=1e-5, abs=1e-4), pair[0][-40:]
        assert greedy == expected_greedy, pair[0][-40:]
    assert {greedy for _, greedy in found} == {True, False}


def test_rolling_loglikelihoods_are_those_of_hf_with_one_bos(ours):
    """hf's default reads two from a tokenizer that adds one."""
    peer = HFLM(
        pretrained=str(EMBEDDED_MODEL), device="cpu", dtype="float32", batch_size=4, max_length=ours.max_length,
        add_bos_token=False,
    )  # fmt: skip
    texts = [each.text for each in QUESTIONS[:2]] + ["\n".join(each.text for each in QUESTIONS), "東京", "a"]
    asked = requests("loglikelihood_rolling", *((text,) for text in texts))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(peer.loglikelihood_rolling(asked), rel=1e-5)


def test_outputs_are_those_of_hf(ours, peer):
    options = [
        dict(until=["\n"], max_gen_toks=40),
        dict(until=[".", "\n"], max_gen_toks=40),
        dict(until=[], max_gen_toks=3),
    ]
    asked = requests("generate_until", *((each.prompt, how) for each in QUESTIONS for how in options))
    asked += requests("generate_until", ("a b " * 600, dict(until=["\n"], max_gen_toks=8)))  # cut on the left
    assert ours.generate_until(asked) == peer.generate_until(asked)


def test_a_chat_is_written_by_the_models_template(ours, peer):
    messages = [{"role": "user", "content": "Tell me a story about Mia."}]
    text = ours.apply_chat_template(messages)
    assert text == peer.apply_chat_template(messages)
    assert ours.tok_encode(text) == peer.tok_encode(text)


def test_what_does_not_fit_is_refused(ours):
    with pytest.raises(ValueError, match="max_gen_toks must be less than the context, 512, got 512"):
        ours.generate_until(requests("generate_until", ("a", dict(max_gen_toks=512))))
    with pytest.raises(ValueError, match=r"a continuation of \d+ tokens is longer than the context of 512"):
        ours.loglikelihood(requests("loglikelihood", ("a", " b c" * 600)))


COMMON = """dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
CHOICE = """task: story_choice
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """task: story_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""
ANSWER = """task: story_answer
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 48
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
  - metric: bleu
    aggregation: bleu
    higher_is_better: true
"""


def test_tasks_in_yaml_files_run_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [
        {
            "prompt": each.prompt, "text": each.text, "answer": each.completion,
            "choices": ["Nobody knows.", each.completion.strip()], "gold": 1,
        }
        for each in QUESTIONS
    ]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("answer", ANSWER)):
        (tmp_path / f"{name}.yaml").write_text(text + COMMON.format(data=tmp_path / "d.jsonl"))
    files = ",".join(str(tmp_path / f"{name}.yaml") for name in ("choice", "rolling", "answer"))
    done = CliRunner().invoke(app, ["eval", "embedded", "--lm-eval", files, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    choice, rolling, answer = read_json(tmp_path / "out" / "evaluation.json", Evaluation).tasks

    assert [(s.name, s.value, s.low) for s in choice.scores] == [("acc", 1.0, 1.0)]
    assert [example.output for example in choice.examples] == [" " + row["choices"][1] for row in rows]
    assert choice.examples[0].references == [" " + rows[0]["choices"][1]]

    (bits,) = rolling.scores
    assert bits.lower_is_better and bits.low < bits.value < bits.high
    assert [example.references[0] for example in rolling.examples] == [row["text"] for row in rows]

    exact, bleu = answer.scores
    assert exact.value == sum(e.output == row["answer"] for e, row in zip(answer.examples, rows, strict=True)) / 6 > 0.5
    assert bleu.value > 60 and bleu.low is None  # lm-eval's BLEU keeps no statistics of examples
