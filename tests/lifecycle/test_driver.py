"""examples/lifecycle/lifecycle.py: which stages it runs, and what becomes of one that is killed, on stages that cost nothing."""

import fcntl
import subprocess
import sys

import pytest

from tests.lifecycle.conftest import FOLDER

NOTE = 'open("ran", "a").write("{name} "); open("{name}.txt", "a").write("whole ")\n'


@pytest.fixture
def life(program, tmp_path, monkeypatch):
    """The module with the stages a and b, which need nothing and a; each notes in `ran` that it was run."""
    module = program("lifecycle")
    here = tmp_path / "here"
    here.mkdir()
    for name in "ab":
        (here / f"{name}.py").write_text(NOTE.format(name=name))
    monkeypatch.setattr(module, "HERE", here)
    stages = {"a": module.Stage("python @a.py", ("a.txt",)), "b": module.Stage("python @b.py", ("b.txt",), ("a",))}
    monkeypatch.setattr(module, "STAGES", stages)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["lifecycle.py", "--out", "run", *arguments])
        return module.main()

    module.run, module.here, module.out = run, here, tmp_path / "run"
    return module


def ran(life) -> str:
    path = life.out / "ran"
    return path.read_text() if path.exists() else ""


def test_a_complete_stage_is_not_run_again(life):
    assert life.run() == 0 and life.run() == 0
    assert ran(life) == "a b "


def test_redo_runs_it_again_and_begins_anew(life):
    life.run()
    life.run("a", "--redo")
    assert ran(life) == "a b a "
    assert (life.out / "a.txt").read_text() == "whole "


def test_what_a_changed_file_has_made_is_made_anew_and_what_came_after_it(life):
    life.run()
    (life.here / "a.py").write_text(NOTE.format(name="a") + "# changed\n")
    life.run()
    assert ran(life) == "a b a b "
    assert (life.out / "b.txt").read_text() == "whole "


def test_quick_is_another_command(life, monkeypatch):
    life.run()
    quick = life.Stage("python @b.py", ("b.txt",), ("a",), "few")
    monkeypatch.setitem(life.STAGES, "b", quick)
    life.run("--quick")
    assert ran(life) == "a b b "


def test_what_was_taken_away_is_made_again(life):
    life.run()
    (life.out / "b.txt").unlink()
    life.run()
    assert ran(life) == "a b b "


def test_a_stage_alone_says_what_it_needs(life, capsys):
    assert life.run("b") == 1
    assert "stage b needs a" in capsys.readouterr().err
    assert life.run("a") == 0 and life.run("b") == 0
    assert ran(life) == "a b "


def test_an_unknown_stage(life, capsys):
    with pytest.raises(SystemExit):
        life.run("c")
    assert "there is no stage 'c'; there are a, b" in capsys.readouterr().err


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_killed_stage_is_run_again(life, monkeypatch, capsys, goes_on):
    killed_once = 'import os, sys\nif not os.path.exists("again"):\n    open("again", "w"); open("a.txt", "w").write("half, then "); os.kill(os.getpid(), 9)\n'
    (life.here / "a.py").write_text(killed_once + NOTE.format(name="a"))
    monkeypatch.setitem(life.STAGES, "a", life.Stage("python @a.py", ("a.txt",), goes_on=goes_on))
    assert life.run() == 1
    assert "stage a ended with status -9" in capsys.readouterr().err
    assert life.run() == 0
    assert (life.out / "a.txt").read_text() == ("half, then whole " if goes_on else "whole ")
    assert ran(life) == "a b "


def test_two_runs_in_one_folder(life, capsys):
    life.out.mkdir()
    with (life.out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert life.run() == 1
    assert "another run is at work in run" in capsys.readouterr().err


def test_what_a_killed_driver_has_started_keeps_the_folder(life, capsys):
    """Otherwise two would write the same files."""
    waits = "import sys; open('started', 'w').close(); sys.stdin.read()\n"
    (life.here / "a.py").write_text(waits)
    program = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import lifecycle; from pathlib import Path\n"
    program += (
        f"lifecycle.HERE = Path({str(life.here)!r}); lifecycle.STAGES = {{'a': lifecycle.Stage('python @a.py', ())}}\n"
    )
    program += "sys.argv = ['lifecycle.py', '--out', 'run']; lifecycle.main()"
    driver = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    while not (life.out / "started").exists():
        assert driver.poll() is None
    driver.kill()
    driver.wait()
    assert life.run() == 1
    assert "what one has started still is" in capsys.readouterr().err
    driver.stdin.close()
