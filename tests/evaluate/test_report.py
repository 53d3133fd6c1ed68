"""The page and the table say what the file says, the worst first, and whatever a model writes is text."""

import pytest
from rich.console import Console

from llama_fast.evaluate.report import view
from llama_fast.evaluate.report.page import page
from llama_fast.evaluate.report.terminal import show
from tests.browser import element, opened
from tests.evaluate.evaluations import answers, evaluation, text_answers
from tests.parity import not_interpreted

pytestmark = not_interpreted

WORDS = ["yes"] * 20 + ["yes, maybe", "<script>alert(1)</script> & more"]
FOUND = evaluation(quiz=answers(WORDS, ["f1", "bleu"]), text=text_answers([3.0, 9.0, 5.0]))


def test_the_worst_come_first():
    quiz, text = FOUND.tasks
    assert [example.output for example in view.worst(quiz)][:2] == [WORDS[-1], WORDS[-2]]
    assert len(view.worst(quiz)) == 2  # those that are right are none of the worst
    assert len(view.worst(evaluation(quiz=answers(["no"] * 30, ["f1"])).tasks[0])) == view.WORST
    assert [example.references[0] for example in view.worst(text)] == ["passage 01", "passage 02", "passage 00"]


def test_the_table_has_every_score_with_its_interval():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(FOUND, console)
    printed = console.export_text()
    assert "quiz, 22 examples" in printed and "text, 3 passages" in printed
    assert "tok:13a" in printed
    for task in FOUND.tasks:
        for score in task.scores:
            assert view.figure(score.value, score.unit) in printed and view.interval(score) in printed


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.95, "share", "95 %"), (1.0, "share", "100 %"), (0.6543, "share", "65 %"), (2.45678, "bits/byte", "2.4568"),
        (37.2134, "", "37.21"), (100.0, "", "100.0"), (123456.0, "", "123,500"),
    ],
)  # fmt: skip
def test_figures(value, unit, text):
    assert view.figure(value, unit) == text


def test_the_page_shows_text_and_runs_nothing(tmp_path, browser):
    file = tmp_path / "evaluation.html"
    file.write_text(page(FOUND))
    for width in (1100, 380):
        opened(browser, file, width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert "<script>alert(1)</script> & more" in element(browser, "#task-1 .example dd:nth-of-type(2)").text
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.scripts.length") == 0
    assert element(browser, "#facts").text.count("sacrebleu 2.6.0") == 1
    assert element(browser, "#task-1 h3").text == "The worst by token F1"
    file.write_text(page(evaluation(quiz=answers(["yes"] * 9, ["bleu"]))))
    opened(browser, file, 1100)
    assert element(browser, "#task-1 h3").text == "None is below the best BLEU; the first"
    assert len(browser.find_elements("css selector", ".example")) == 3
