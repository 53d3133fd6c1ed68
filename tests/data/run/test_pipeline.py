"""Whole runs: planted dirt is found and named, doubles go, and a run that was stopped ends as one that was not."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from llama_fast.config_file import read_config
from llama_fast.data.config import Config
from llama_fast.data.run.pipeline import Run
from llama_fast.data.run.state import forget
from llama_fast.data.shards import Shards
from llama_fast.data.steps.adapter import read_documents
from llama_fast.decoder.tokenizer import Tokenizer
from llama_fast.reports.jsonfile import read_json
from tests.data.run.corpora import CONFIG, paragraphs, write_corpus
from tests.data.steps.test_changes import PAGE
from tests.data.steps.test_filters import CHINESE, JAPANESE, PROSE
from tests.parity import not_interpreted

pytestmark = not_interpreted


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(text=CONFIG, *settings):
    Path("data.toml").write_text(text)
    return read_config("data.toml", Config, settings)


def texts(folder):
    return [document.text for document in read_documents(Path(folder))]


def output(out):
    """Every file that is a result, by name: not the logs, nor the report with its seconds."""
    folders = ("collect", "clean", "held_out", "dedup", "mixture", "tokenizer", "shards", "shards_held_out")
    files = (file for folder in folders for file in sorted((Path(out) / folder).rglob("*")) if file.is_file())
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def step(run, name):
    return next(each for each in run.records() if each.name == name)


def reasons(run, name):
    return {removal.reason: removal.documents for removal in step(run, name).removed}


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """A run over 200 good paragraphs and one piece of dirt of each kind."""
    folder = tmp_path_factory.mktemp("dirty")
    before = os.getcwd()
    os.chdir(folder)
    good = paragraphs(200)
    write_corpus(Path("texts"), good)
    with open("texts/part1.jsonl", "ab") as file:
        file.write(b'{"text": "broken\n{"txt": "other"}\n')
    rows = [
        PROSE.replace("river", "cafÃ©"), CHINESE, JAPANESE, "Too short.", "", "word " * 100, "buy now " * 60,
        good[7].upper() + "!", " ".join([*good[9].split()[:-2], "other", "end."]), good[20] + " Mail a.b@mail.org, card 4111 1111 1111 1111.",
        "An examined text has these words in it: " + PROSE.split(" People ")[0] + " " + good[3][::-1],
    ]  # fmt: skip
    Path("texts/rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    Path("texts/page.html").write_text(
        PAGE.replace("<p>It goes", "".join(f"<p>{text}</p>" for text in good[:0]) + "<p>It goes")
    )
    Path("texts/cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(9000).hex().encode())[:5000])
    Path("texts/bytes.txt").write_bytes(b"not \xff utf-8")
    Path("texts/play_held.txt").write_text(good[5] + "\n\nAnd a play nobody may see." + CHINESE[::-1])
    Path("exam.txt").write_text(PROSE.split(" People ")[0])
    text = CONFIG.replace('path = "texts"\n', 'path = "texts"\nhold_out = ["*held*"]\n') + (
        '[clean]\nmask = ["email", "card"]\n[[decontaminate.against]]\nname = "exam"\npath = "exam.txt"\n'
    )
    run = Run(config(text), max_bad=0.05, named="data.toml")
    run.run()
    yield run, good
    os.chdir(before)


def test_faults_are_counted_and_named(dirty):
    run, _ = dirty
    named = {(Path(fault.file).name, fault.line) for fault in step(run, "read").named_faults}
    broken = {("part1.jsonl", 51), ("part1.jsonl", 52), ("cut.jsonl.gz", None), ("bytes.txt", 1)}
    assert named == broken and step(run, "read").faults == 4


def test_each_kind_of_dirt_is_removed_with_its_reason(dirty):
    run, _ = dirty
    assert reasons(run, "length") == {"empty": 1}
    assert reasons(run, "quality (Gopher)")["short doc"] >= 2
    assert reasons(run, "repetition (Gopher)") == {"top 2 gram": 2}
    assert reasons(run, "decontamination")["shares 13 words with exam"] == 2
    assert step(run, "mask").counts and {count.what: count.times for count in step(run, "mask").counts} == {
        "email": 1,
        "card": 1,
    }
    assert step(run, "exact doubles").documents_removed == 1
    assert step(run, "near doubles (MinHash)").documents_removed == 2
    (example,) = step(run, "length").removed[0].examples
    assert example.document == "texts/rows.jsonl:5"


def test_good_text_is_left_in_every_script(dirty):
    run, good = dirty
    left = texts("out/dedup")
    assert CHINESE in left and JAPANESE in left
    assert not any("Ã" in text for text in left)
    lost = set(good) - set(left)
    assert len(lost) <= 4 and step(run, "near doubles (MinHash)").documents_out == len(left)
    tokenizer = Tokenizer("out/tokenizer")
    shards = Shards("out/shards", tokenizer)
    decoded = {tokenizer.backend.decode(shards[i].tolist(), skip_special_tokens=True) for i in range(len(shards))}
    assert decoded == set(left)


def test_what_is_held_out_is_kept_apart(dirty):
    run, good = dirty
    (held_out,) = texts("out/held_out")
    assert held_out.startswith(good[5])
    assert good[5] not in texts("out/clean")  # it shares words with what is held out
    assert reasons(run, "decontamination")["shares 13 words with what is held out"] == 1
    assert len(Shards("out/shards_held_out", Tokenizer("out/tokenizer"))) == 1


def test_the_report_of_a_run_adds_up(dirty):
    run, _ = dirty
    report = run.report()
    for before, after in zip(report.steps, report.steps[1:], strict=False):
        assert (before.documents_out, before.bytes_out) == (after.documents_in, after.bytes_in)
        assert before.lengths_out == after.lengths_in or before.name == "read"
    for each in report.steps[1:]:
        assert each.documents_in == each.documents_out + each.documents_removed
        assert sum(each.lengths_out) == each.documents_out and each.seconds >= 0
    assert report.shards[0].documents == report.steps[-1].documents_out and report.vocab_size == 600


def test_again_changes_nothing_and_other_settings_are_refused(dirty):
    run, _ = dirty
    before = output("out")
    run.run()
    assert output("out") == before
    text = Path("data.toml").read_text()
    with pytest.raises(ValueError, match=r"dedup\.ngram was 5 and is 7.*another `out`.*--redo dedup"):
        Run(config(text, "dedup.ngram=7")).run()
    with pytest.raises(ValueError, match=r"clean\.mask\.0 was 'email' and is not set"):
        Run(config(text, "clean.mask=[]")).run(["clean"])
    config(text)
    Path("texts/new.txt").write_text("x")
    with open("texts/part2.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"texts/new\.txt is new; texts/part2\.jsonl has changed"):
        Run(config(text)).run()
    assert output("out") == before


def test_steps_need_those_before_them(here):
    write_corpus(here / "texts", paragraphs(20))
    with pytest.raises(ValueError, match="step collect is not complete"):
        Run(config()).run(["clean"])
    Run(config()).run(["collect"])
    with pytest.raises(ValueError, match="step clean is not complete"):
        Run(config()).run(["dedup"])
    changed = config(CONFIG, "filters.min_chars=3")
    Run(changed).run(["clean"])
    (here / "out/clean/00001.jsonl.zst").unlink()
    with pytest.raises(ValueError, match=r"has 2 of 3 files.*--redo clean"):
        Run(changed).run(["clean"])
    Run(changed).run(["clean"], redo="clean")
    assert len(texts("out/clean")) == 20


def test_what_a_forgotten_step_has_left_does_not_count(here):
    """As after a kill between forgetting a step and removing what it has made."""
    write_corpus(here / "texts", paragraphs(20))
    Run(config()).run(["collect", "clean"])
    forget(here / "out/state.json", ["clean"])
    Run(config(CONFIG, "filters.min_chars=100000")).run(["clean"])
    assert texts("out/clean") == []


def test_folders_of_somebody_else_are_left_alone(here):
    write_corpus(here / "texts", paragraphs(8))
    (here / "out/clean").mkdir(parents=True)
    (here / "out/clean/mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"out/clean is there, and no run of `llama-fast data` made it"):
        Run(config()).run()
    assert [file.name for file in (here / "out/clean").iterdir()] == ["mine.txt"] and not (
        here / "out/collect"
    ).exists()


def test_a_file_between_steps_that_was_cut_is_seen(here):
    write_corpus(here / "texts", [os.urandom(200).hex() for _ in range(20)])
    run = Run(config(CONFIG + "[filters]\nquality = false\nrepetition = false\n"))
    run.run(["collect"])
    file = here / "out/collect/00000.jsonl.zst"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"collect/00000\.jsonl\.zst was cut or changed.*--redo"):
        run.run(["clean"])
    file.write_bytes(zstandard.compress(zstandard.ZstdDecompressor().decompress(whole, 1 << 20).partition(b"\n")[2]))
    with pytest.raises(ValueError, match=r"has read 19 documents, and collect: read had written 20.*--redo collect"):
        run.run(["clean"])
    run.run(redo="collect", steps=["collect", "clean"])
    assert len(texts("out/clean")) == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tokenizer.vocab_size=100"], "vocab_size must be at least 262"),
        (["tokenizer.path='nowhere'"], "nowhere has no tokenizer.json"),
        (["tokenizer.chat_template='nowhere'"], "chat_template must be a file, and there is none at nowhere"),
        (["decontaminate.against=[{name='exam', path='nowhere'}]"], "source 'exam': there is nothing at nowhere"),
        (["filters.languages=['xx']"], "lingua"),
        (["sources.0.hold_out=['part9*']"], r"no file is named as 'part9\*', which hold_out says"),
    ],
)
def test_what_is_wrong_with_a_late_step_is_said_before_the_first(here, settings, message):
    write_corpus(here / "texts", paragraphs(8))
    with pytest.raises(ValueError, match=message):
        Run(config(CONFIG, *settings)).run()
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("out=", "out must be a folder"), ("tasks=0", "tasks must be 1 to 99,999, and is 0"),
        ("dedup.ngram=0", "dedup: ngram must be at least 1"), ("dedup.buckets=0", "buckets must be"), ("dedup.hashes=-1", "hashes must be"),
        ("decontaminate.ngram=0", "ngram must be"), ("mixture.max_epochs=0", "max_epochs must be a number above 0"),
        ("executor.workers=-1", "workers must be at least 1, or 0"), ("filters.min_language_confidence=2", "from 0 to 1"),
        ("filters.min_chars=99999999", "min_chars must be at most max_chars"), ("sources.0.weight=inf", "weight must be a number above 0"),
        ("sources.0.weight=0", "weight must be"), ("decontaminate.against=[{name='a/b', path='x'}]", "must be one of a file"),
        ("decontaminate.against=[{name='a', path='x'}, {name='a', path='y'}]", "one evaluation set alone"),
        ("tokenizer={path='x', chat_template='y'}", "leave one of the two out"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(here, setting, message):
    with pytest.raises(ValueError, match=message):
        config(CONFIG, setting)


def test_settings_with_many_digits_are_the_same_again(here):
    write_corpus(here / "texts", paragraphs(8))
    for _ in range(2):
        Run(config(CONFIG, "filters.gopher_repetition.dup_line_frac=0.123456789")).run(["collect", "clean"])


def test_a_step_that_does_not_run_is_not_thrown_away(here):
    write_corpus(here / "texts", paragraphs(8))
    Run(config()).run(["collect"])
    with pytest.raises(ValueError, match="--redo collect would throw away what is not made again"):
        Run(config()).run(["clean"], redo="collect")
    assert len(texts("out/collect")) == 8


def test_its_own_folder_is_no_source(here):
    write_corpus(here, paragraphs(8))
    for _ in range(2):
        Run(config(CONFIG, "sources.0.path='.'")).run()
    assert len(texts("out/collect")) == 8


def test_too_many_faults_stop_the_run(here):
    write_corpus(here / "texts", paragraphs(20))
    with open("texts/part1.jsonl", "a") as file:
        file.write("no json\n")
    with pytest.raises(ValueError, match=r"1 of 21 lines.*--max-bad 1%.*texts/part1.jsonl:6 is no JSON"):
        Run(config()).run()
    assert not Path("out/clean").exists()
    Run(config(), max_bad=0.05).run(["collect"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['sources.0.hold_out=["*"]'], "all files of all sources are held out"),
        (["filters.gopher_quality.min_doc_words=5000"], "no document is left to train a tokenizer on"),
        (['sources.0.text="body"'], "could not be read"),
    ],
)
def test_nothing_left_is_an_error(here, settings, message):
    write_corpus(here / "texts", paragraphs(8))
    with pytest.raises(ValueError, match=message):
        Run(config(CONFIG, *settings)).run()


def test_copies_are_found_and_clean_documents_kept(here):
    """1,000 paragraphs, 100 copies with other capitals and marks, 100 with one of 80 words changed."""
    clean = paragraphs(1000, seed=1)
    rng = random.Random(2)
    copies = [text.upper().replace(" ", "  ") + "!!" for text in clean[:100]]
    near = []
    for text in clean[100:200]:
        words = text.split()
        words[rng.randrange(80)] = "elsewhere"
        near.append(" ".join(words))
    everything = clean + copies + near
    rng.shuffle(everything)
    write_corpus(here / "texts", everything)
    run = Run(config(CONFIG + "[filters]\nquality = false\nrepetition = false\n"))
    run.run(["collect", "clean", "dedup"])
    left = set(texts("out/dedup"))
    assert step(run, "exact doubles").documents_removed == 100
    found = 400 - len(left & set(clean[:200] + copies + near))
    assert found >= 0.99 * 200 and len(set(clean[200:]) - left) <= 1


def test_sources_are_mixed_by_tokens(here):
    write_corpus(here / "a", paragraphs(300, seed=1))
    write_corpus(here / "b", paragraphs(100, seed=2))
    text = 'out = "out"\ntasks = 2\n[[sources]]\nname = "a"\npath = "a"\n[[sources]]\nname = "b"\npath = "b"\nweight = 3\n[tokenizer]\nvocab_size = 600\n'
    run = Run(config(text))
    run.run()
    a, b = run.report().mixture
    longest = 400  # tokens; of each of the two tasks a document may be too many or too few
    assert b.tokens_after == b.tokens_before and a.tokens_after == pytest.approx(b.tokens_after / 3, abs=2 * longest)
    assert (
        run.report().shards[0].tokens == a.tokens_after + b.tokens_after + 2 * run.report().shards[0].documents
    )  # BOS, EOS
    used = [document.metadata["source"] for document in read_documents(Path("out/mixture"))]
    assert used.count("b") == 100 and used.count("a") == pytest.approx(33, abs=3)
    assert run.report().mixture[0].weight == 1  # beside one that has a weight
    Run(config(text, "mixture.max_epochs=2"), named="x").run(redo="tokenize")
    used = [document.metadata["source"] for document in read_documents(Path("out/mixture"))]
    assert used.count("b") == 200 and used.count("a") == pytest.approx(67, abs=5)


COMMAND = [sys.executable, "-c", "from llama_fast.cli.main import app; app()", "data", "run", "data.toml"]


def kill_and_restart(folder, expected, moment):
    """Runs with two processes, kills all of it at `moment` (seconds), runs again, and compares."""
    process = subprocess.Popen(COMMAND, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(moment)
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(COMMAND, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert output(folder / "out") == expected
    return ended


@pytest.fixture
def undisturbed(here):
    """A corpus, what an undisturbed run with one process makes of it, and its seconds."""
    write_corpus(here / "texts", paragraphs(250, seed=3))
    config(CONFIG + "[executor]\nworkers = 2\n")
    (here / "expected").mkdir()
    os.symlink(here / "texts", "expected/texts")
    os.chdir("expected")
    started = time.monotonic()
    Run(config(CONFIG)).run()
    os.chdir(here)
    return output("expected/out"), time.monotonic() - started


def test_killed_and_run_again_is_the_same(here, undisturbed):
    expected, seconds = undisturbed
    assert len(expected) > 10
    kill_and_restart(here, expected, 1.5 + random.random() * 2 * seconds)


@pytest.mark.nightly
def test_killed_20_times_is_the_same(here, undisturbed):
    expected, seconds = undisturbed
    for i in range(20):
        folder = here / str(i)
        folder.mkdir()
        os.symlink(here / "texts", folder / "texts")
        os.link(here / "data.toml", folder / "data.toml")
        kill_and_restart(folder, expected, 1 + random.random() * 3 * seconds)


def test_two_runs_in_one_folder_are_refused(here):
    import fcntl

    write_corpus(here / "texts", paragraphs(8))
    Path("out").mkdir()
    with open("out/.lock", "w") as lock:
        lock.write("77")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another run \(process 77\) is at work in .*out"):
            Run(config()).run()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount the small disk that is filled here")
def test_a_full_disk_is_said_and_leaves_nothing_that_looks_whole(here):
    write_corpus(here / "texts", [os.urandom(2000).hex() for _ in range(60)])
    (here / "out").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", "out"], capture_output=True).returncode:
        pytest.skip("this container may not mount the small disk that is filled here")
    chosen = config(CONFIG + "[filters]\nquality = false\nrepetition = false\n")
    try:
        done = subprocess.run(COMMAND, capture_output=True, text=True)
        assert done.returncode == 2 and "the disk of out is full" in done.stderr and "Traceback" not in done.stderr
        kept = {file.name: file.read_bytes() for file in Path("out/collect").glob("*.jsonl.zst")}
        subprocess.run(["mount", "-o", "remount,size=30m", "out"], check=True)
        Run(chosen).run()
        made = output("out")
        assert {name: made[f"collect/{name}"] for name in kept} == kept and len(texts("out/dedup")) == 60
    finally:
        subprocess.run(["umount", "out"], check=True)
    Run(chosen).run()
    assert output("out") == made


def test_state_names_every_step(here):
    write_corpus(here / "texts", paragraphs(20))
    run = Run(config())
    run.run()
    from llama_fast.data.run.state import State

    assert [(each.name, each.complete) for each in read_json("out/state.json", State).steps] == [
        (name, True) for name in ("collect", "clean", "dedup", "tokenizer", "tokenize")
    ]
