"""`eval compare`: worse beyond the noise is exit status 1, and what cannot be compared is refused by name."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from llama_fast.cli.main import app
from llama_fast.evaluate.compare import compare
from llama_fast.reports.jsonfile import write_json
from tests.evaluate.evaluations import answers, evaluation, text_answers
from tests.parity import not_interpreted

pytestmark = not_interpreted

GOOD, WORSE = ["yes"] * 27 + ["no"] * 3, ["yes"] * 12 + ["no"] * 18
ONE_LOST = ["yes"] * 26 + ["no"] * 4


def run_compare(tmp_path, before, after):
    files = [tmp_path / f"{name}.json" for name in ("a", "b")]
    for file, each in zip(files, (before, after), strict=True):
        write_json(file, each)
    return CliRunner().invoke(app, ["eval", "compare", *map(str, files)])


@pytest.mark.parametrize(
    ("before", "after", "verdict", "status"),
    [(GOOD, WORSE, "worse", 1), (WORSE, GOOD, "better", 0), (GOOD, ONE_LOST, "same", 0), (GOOD, GOOD, "same", 0)],
)
def test_the_exit_status_says_whether_the_interval_is_worse(tmp_path, before, after, verdict, status):
    sides = [evaluation(quiz=answers(each, ["exact_match", "f1"])) for each in (before, after)]
    done = run_compare(tmp_path, *sides)
    assert done.exit_code == status, done.output
    assert verdict in done.output
    assert ("WORSE, by" in done.output) == bool(status)


@pytest.mark.parametrize(("change", "verdict"), [(1.1, "worse"), (0.9, "better"), (1.0, "same")])
def test_less_is_better_of_losses(change, verdict):
    nats = [5.0 + (i % 7) for i in range(40)]
    found = compare(*(evaluation(text=text_answers([x * by for x in nats])) for by in (1, change)))
    assert [each.verdict for each in found.changes] == [verdict] * 3
    assert found.is_worse == (verdict == "worse")


def test_bleu_is_compared_by_what_the_files_hold(tmp_path):
    outputs = [["yes we can do it"] * 25, ["yes we do it can"] * 25]
    before, after = (evaluation(text=answers(each, ["bleu"], right="yes we can do it")) for each in outputs)
    found = compare(before, after)
    assert (found.changes[0].before, found.changes[0].verdict) == (pytest.approx(100), "worse")
    assert run_compare(tmp_path, before, after).exit_code == 1


def test_only_the_first_score_of_a_task_decides():
    """All right by F1's half, none by the first: words beside the answer are forgiven by neither."""
    before = evaluation(quiz=answers(["yes"] * 30, ["exact_match", "f1"]))
    after = evaluation(quiz=answers(["yes yes"] * 30, ["f1", "exact_match"]))
    assert compare(after, after).is_worse is False
    swapped = replace(before, tasks=[replace(before.tasks[0], scores=before.tasks[0].scores[::-1])])
    decides = {change.score: change.decides for change in compare(swapped, after).changes}
    assert decides == {"token F1": True, "exact match": False}


def test_several_tasks_share_the_confidence():
    both = evaluation(a=answers(GOOD, ["f1"]), b=answers(GOOD, ["f1"]))
    assert compare(both, both).confidence == pytest.approx(0.975)
    assert compare(evaluation(a=answers(GOOD, ["f1"])), both).confidence == pytest.approx(0.95)


def other_prompt(task):
    examples = [replace(task.examples[0], prompt="something else"), *task.examples[1:]]
    return replace(task, examples=examples)


def other_signature(task):
    return replace(task, scores=[replace(task.scores[0], signature="tok:zh")])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_prompt, "quiz: example 0 is '0' in the first and 'something else' in the second: run both with the same task"),
        (lambda task: replace(task, examples=task.examples[:-1]), "quiz has 30 examples in the first and 29 in the second"),
        (other_signature, "quiz: BLEU is .* in the first and tok:zh in the second"),
        (lambda task: replace(task, name="exam"), "no task is in both: quiz in the first, exam in the second"),
        (lambda task: replace(task, scores=[replace(task.scores[0], low=None)]), "quiz has no score in both"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(tmp_path, change, says):
    before = evaluation(quiz=answers(GOOD, ["bleu"]))
    after = replace(before, tasks=[change(before.tasks[0])])
    with pytest.raises(ValueError, match=says):
        compare(before, after)
    done = run_compare(tmp_path, before, after)
    assert done.exit_code == 2 and "error:" in done.output


def test_notes_say_what_else_differs():
    before = evaluation(quiz=answers(GOOD[-5:], ["f1"]), old=answers(GOOD, ["f1"]))
    after = replace(evaluation(quiz=answers(GOOD[-5:], ["f1"])), dtype="bfloat16", versions={"sacrebleu": "9"})
    notes = compare(before, after).notes
    assert "the dtype differs: float32 and bfloat16" in notes
    assert "sacrebleu differs: 2.6.0 and 9" in notes
    assert "both are of the same model" in notes
    assert "quiz has 5 examples only: its intervals are no more than a hint" in notes
    assert "only in the first: old" in notes


def test_what_is_no_evaluation_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    done = CliRunner().invoke(app, ["eval", "compare", str(tmp_path / "a.json"), str(tmp_path / "missing")])
    assert done.exit_code == 2
    assert "a.json is no Evaluation file of llama-fast" in done.output.replace("\n", "")
