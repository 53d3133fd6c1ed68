"""Engines in processes of their own, side by side: measured in turns, judged, skipped by name. The peers are fakes: ours, or what is wrong with it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_fast.benchmarks import bench_generate
from llama_fast.benchmarks.engines import cases as engines
from llama_fast.benchmarks.engines.cases import EngineCase, Session, agreement, engine_cases
from llama_fast.benchmarks.engines.peers import LLAMA_CPP, OPENVINO, Peer, folder_of, load_saved
from llama_fast.benchmarks.engines.process import Program, ours
from llama_fast.benchmarks.generation import FIRST_TOKEN, INTER_TOKEN, MIN_ROUNDS, chat_ids, prompts_of, work_of
from llama_fast.benchmarks.models import StoredModel
from llama_fast.benchmarks.peers import OURS, Unavailable
from llama_fast.benchmarks.suite.comparison import Case, unavailable
from llama_fast.benchmarks.suite.record import Result, Skipped
from llama_fast.decoder.tokenizer import Tokenizer
from llama_fast.kernels.launch import INTERPRETED
from llama_fast.profiler.measure.limits import Limits
from tests.benchmarks.test_whole import LLAMA, QWEN

pytestmark = pytest.mark.skipif(INTERPRETED, reason="whole models in the interpreter take minutes")

CPU = torch.device("cpu")
CHATTY = StoredModel("chatty", Path(bench_generate.EMBEDDED_MODEL))
LIMITS = Limits(1e10, 1e10, {"float32": 1e11}, 1e-6, None, 1 << 20)
ENGINE = """
import os, sys
from llama_fast.benchmarks.engines import llama_fast_engine
VERSION, FAULT = "fake 1.0", {fault!r}
class Fake:
    def __init__(self, engine): self.engine, self.turns = engine, 0
    def logits(self, ids): return self.engine.logits(ids)
    def generate(self, prompts, new):
        self.turns += 1
        with open({log!r}, "a") as log: print({name!r}, file=log)
        times, texts = self.engine.generate(prompts, new)
        if FAULT == "token": texts[0][3] = (texts[0][3] + 1) % 1200
        if FAULT == "later token" and self.turns > 1: texts[0][3] = (texts[0][3] + 1) % 1200
        if FAULT == "ends" and self.turns == 5: sys.exit("it is over")
        return times, texts
def load(**settings): return Fake(llama_fast_engine.load(**settings))
"""


def itself(folder: Path, dtype: torch.dtype) -> Path:
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Result], list[str]]:
    """The results of a case with two fakes that are right, of which one differs later, and two that are not; and who generated when."""
    folder = tmp_path_factory.mktemp("engines")
    there = {OURS: Peer(ours(), itself)}
    for name, fault in {"same": "", "other": "later token", "wrong": "token", "ends": "ends"}.items():
        file = folder / f"{name}.py"
        file.write_text(ENGINE.format(name=name, fault=fault, log=str(folder / "log")))
        there[name] = Peer(Program(file, Path(sys.executable)), itself)
    there["absent"] = Peer(Program(folder / "absent.py", folder / "bin" / "python"), itself)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "engines", lambda: there)
        # on a busy machine turns would be repeated
        patch.setattr("llama_fast.profiler.measure.quiet.waited_seconds", lambda _: 0.0)
        (case,) = session_cases(Session(LLAMA, torch.float32, 1, quick=True))
        assert unavailable([case]) == [Skipped("engines", "absent", "not installed; make peers")]
        results = {result.implementation: result for result in case.measure(CPU, LIMITS, seconds=0.0)}
    assert all(result.work_key == ("engines", case.shape, "float32", INTER_TOKEN) for result in results.values())
    work = work_of(case.setting, INTER_TOKEN)
    assert results[OURS].flops == work.flops
    # a model as small as this one is read at the rate of a cache: the machine's would be no limit
    assert 0 < results[OURS].floor_s < LIMITS.memory_floor_s(work) or results[OURS].floor_s == work.flops / 1e11
    return results, (folder / "log").read_text().split()


def session_cases(session: Session) -> list[EngineCase]:
    return [EngineCase(session, setting, direction) for setting, direction in session.settings().items()]


def test_who_is_right_is_timed(measured: tuple[dict[str, Result], list[str]]) -> None:
    results, _ = measured
    assert list(results) == [OURS, "same", "other", "wrong", "ends"]
    for name in (OURS, "same", "other"):
        result = results[name]
        assert result.failure is None and len(result.samples) == MIN_ROUNDS * 15
        assert all(sample > 0 for sample in result.samples)
        assert result.error is not None and result.bound is not None and 0 < result.error <= result.bound < 1e-5


def test_notes_say_memory_rate_and_how_many_tokens_agree(measured: tuple[dict[str, Result], list[str]]) -> None:
    notes = {name: str(result.note) for name, result in measured[0].items()}
    for name in (OURS, "same", "other"):
        assert "peak memory " in notes[name] and " more than after imports; " in notes[name]
        assert f"; {1 / measured[0][name].timing.median:,.0f} tokens/s" in notes[name]
    assert "tokens as" not in notes[OURS]
    assert notes["same"].startswith("fake 1.0; ") and "; 16 of 16 greedy tokens as llama-fast's" in notes["same"]
    assert "; 15 of 16 greedy tokens as llama-fast's, the first other one is token 3" in notes["other"]


def test_who_is_wrong_or_ends_has_no_speed(measured: tuple[dict[str, Result], list[str]]) -> None:
    results, _ = measured
    assert str(results["wrong"].failure).startswith("FAIL: error") and not results["wrong"].samples
    says = "it cannot be timed: its process ended with status 1: it is over"
    assert results["ends"].failure == says and not results["ends"].samples


def test_they_take_turns(measured: tuple[dict[str, Result], list[str]]) -> None:
    """Each round is one turn of each of those that stay, and not always the same one is first."""
    turns = [name for name in measured[1] if name in ("same", "other")][-2 * MIN_ROUNDS :]
    rounds = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    assert all(sorted(each) == ["other", "same"] for each in rounds)
    assert {each[0] for each in rounds} == {"same", "other"}


def test_what_is_measured_of_a_model() -> None:
    found = session_cases(Session(LLAMA, torch.bfloat16, 2))
    assert [(case.shape, case.direction) for case in found] == [
        ("tiny, batch 1, 64 + 32 tokens, 2 threads", INTER_TOKEN),
        ("tiny, batch 8, 64 + 32 tokens, 2 threads", INTER_TOKEN),
        ("tiny, batch 1, 127 + 1 tokens, 2 threads", FIRST_TOKEN),
    ]
    model = StoredModel("small", Path(bench_generate.EMBEDDED_MODEL))
    sessions = {case.session for case in engine_cases(quick=False, model=model)}
    assert {(each.dtype, each.threads) for each in sessions} == {
        (dtype, threads) for dtype in (torch.float32, torch.bfloat16) for threads in (1, 2)
    }
    assert {each.model.name for each in sessions} == {"small"}


def test_of_real_models_what_they_are_used_for_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def real() -> list[str]:
        return [
            f"{case.shape}, {case.dtype}" for case in engine_cases(quick=False) if case.session.model.name != "125M"
        ]

    monkeypatch.setattr(engines.smollm2, "installed", lambda: None)
    embedded = [
        f"embedded, batch {what}, 1 thread, torch.float32"
        for what in ("1, 64 + 32 tokens", "8, 64 + 32 tokens", "1, 511 + 1 tokens")
    ]
    assert real() == embedded
    monkeypatch.setattr(engines.smollm2, "installed", lambda: CHATTY.path)
    tokens = f"{len(chat_ids(CHATTY))} + 32 tokens"
    assert real()[len(embedded) :] == [
        f"smollm2, chat, {tokens}, {threads}, torch.bfloat16" for threads in ("1 thread", "2 threads")
    ]


def test_the_prompt_of_a_chat_is_a_question_by_the_template() -> None:
    (setting,) = Session(CHATTY, torch.float32, 1, chat=True).settings()
    (ids,) = prompts_of(setting, CPU).tolist()
    assert ids == chat_ids(CHATTY) and len(ids) == setting.prompt
    assert "Why is the sky blue?" in Tokenizer(CHATTY.path).decode(ids, skip_special=False)


def test_what_is_saved_for_them_has_the_tokens_of_the_model() -> None:
    folder = folder_of(CHATTY, torch.float32)
    load_saved(CHATTY, torch.float32, folder)
    assert Tokenizer(folder).encode("Why is the sky blue?") == Tokenizer(CHATTY.path).encode("Why is the sky blue?")


def test_they_are_measured_on_a_cpu_alone() -> None:
    def of(device: str) -> list[Case]:
        return [case for case in bench_generate.cases(torch.device(device), quick=False) if case.op == "engines"]

    assert len(of("cpu")) >= 15 and not of("cuda")


def test_without_peers_nothing_is_measured_and_each_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_fast.benchmarks.engines.process.ENVIRONMENTS", tmp_path)
    case = engine_cases(quick=True)[0]
    reason = "not installed; make peers"
    assert case.implementations() == {name: Unavailable(reason) for name in (LLAMA_CPP, OPENVINO)}
    assert unavailable([case]) == [Skipped("engines", name, reason) for name in (LLAMA_CPP, OPENVINO)]
    assert case.measure(CPU, LIMITS, seconds=0.0) == []


def test_a_model_that_llama_cpp_is_not_given_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Program, "is_installed", True)
    case = session_cases(replace(Session(LLAMA, torch.float32, 1), model=QWEN))[0]
    found = case.implementations()
    assert found[LLAMA_CPP] == Unavailable("a GGUF file is written of a llama alone, and this is a qwen3")
    assert not isinstance(found[OURS], Unavailable) and not isinstance(found[OPENVINO], Unavailable)


def test_agreement_counts_all_rows_and_names_the_first_other_token() -> None:
    assert agreement([[1, 2], [3, 4]], [[1, 2], [3, 4]]) == "4 of 4 greedy tokens as llama-fast's"
    assert agreement([[1, 9, 3], [8, 5, 9]], [[1, 2, 3], [8, 5, 6]]) == (
        "4 of 6 greedy tokens as llama-fast's, the first other one is token 1"
    )
