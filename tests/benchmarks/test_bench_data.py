"""The benchmark of data: every step is measured, and what cannot be is named."""

import sys
from importlib.util import find_spec

from llama_fast.benchmarks import bench_data


def test_every_step_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the benchmark sets it for its process
    monkeypatch.setattr(sys, "argv", ["bench_data", "--documents", "3", "--rounds", "1"])
    bench_data.main()
    lines = capsys.readouterr().out.splitlines()
    ours = [line for line in lines if "llama-fast" in line]
    assert len(ours) == 13 and lines[0].startswith("3 documents of pydoc")
    tokens = {line[22:34].strip(): line.split()[-1] for line in lines if line.startswith("tokenize ")}
    assert (
        int(tokens["llama-fast"].replace(",", "")) - int(tokens["datatrove"].replace(",", "")) == 3
    )  # ours writes BOS
    assert find_spec("spacy") or sum("spaCy is not installed" in line for line in lines) == 3
