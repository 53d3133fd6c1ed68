"""The same pipeline on other executors: a Slurm that is four shell scripts, and what is said where one is missing."""

import os
import sys
from pathlib import Path

import pytest

from llama_fast.config_file import read_config
from llama_fast.data.config import Config
from llama_fast.data.run import executor
from llama_fast.data.run.pipeline import Run
from tests.data.run.corpora import CONFIG, paragraphs, write_corpus
from tests.data.run.test_pipeline import output
from tests.parity import not_interpreted

pytestmark = not_interpreted

SLURM = {
    "sbatch": """
for file; do :; done
case "$(head -40 $file)" in *merge_stats*) echo Submitted batch job 8; exit;; esac
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' $file)
export SLURM_JOB_ID=7 SLURM_NODELIST=here RUN_OFFSET=0
for i in $(seq 0 $last); do SLURM_ARRAY_TASK_ID=$i SLURM_PROCID=0 bash $file >> slurm.log 2>&1; done
echo Submitted batch job 7
""",
    "srun": 'while [ "${1#-}" != "$1" ]; do test "$1" = -n && shift; shift; done; exec "$@"',
    "squeue": "true",
    "scontrol": "echo here",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(Path("texts"), paragraphs(12))
    Path("data.toml").write_text(CONFIG)
    return tmp_path


def run(*settings, steps=("collect",)):
    Run(read_config("data.toml", Config, ["tasks=2", *settings])).run(steps)


ON_SLURM = ('executor.kind="slurm"', 'executor.slurm.time="1:00:00"', 'executor.slurm.partition="cpu"')


def work(here, function, workers=2):
    executor.execute([function], tasks=3, work=here / "work", settings=executor.Executor(), workers=workers)


def test_a_killed_process_ends_the_run_and_the_next_one_completes_it(here):
    """As the kernel does where memory runs out. A pool of processes waits for ever."""

    def die_once(data, rank, world_size):
        if rank == 1 and not (here / "killed").exists():
            (here / "killed").touch()
            os.kill(os.getpid(), 9)
        return ()

    with pytest.raises(ValueError, match=r"process of task 1 ended with status -9.*executor\.workers below 2"):
        work(here, die_once)
    work(here, die_once)
    assert len(list((here / "work" / "completions").iterdir())) == 3


def test_an_error_that_cannot_be_sent_is_told(here):
    class Odd(OSError):
        def __init__(self, *, response):
            super().__init__(f"the store said {response}")

    def fail(data, rank, world_size):
        raise Odd(response=500)

    with pytest.raises(ValueError, match="the store said 500"):
        work(here, fail)


def test_slurm_makes_the_same_documents(here, monkeypatch):
    monkeypatch.setattr(executor, "_POLL_SECONDS", 0.01)
    tools = here / "bin"
    tools.mkdir()
    for name, script in SLURM.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    run(*ON_SLURM)
    run('out="local"')
    assert output("out") == output("local") and len(output("out")) == 2

    (tools / "srun").write_text("#!/bin/bash\nexit 1\n")
    with pytest.raises(
        ValueError, match=r"Slurm's job 7 ended with 2 of 2 tasks incomplete.*run the same command again"
    ):
        run('out="again"', *ON_SLURM)


def test_where_there_is_no_slurm(here, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"slurm needs partition and time in the table executor\.slurm"):
        run('executor.kind="slurm"')
    with pytest.raises(ValueError, match="slurm needs sbatch, which is not here"):
        run(*ON_SLURM)


def test_where_there_is_no_ray(here, monkeypatch):
    monkeypatch.setattr(executor, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'Ray, which is not installed: pip install "ray\[default\]"'):
        run('executor.kind="ray"')
