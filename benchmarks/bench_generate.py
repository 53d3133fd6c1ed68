"""Generating with `LLM` beside transformers' `generate`: time to first token, inter-token latency, tokens/s.

    python -m llama_fast.benchmarks.bench_generate --shape 125m --dtype bfloat16 --batch 1

Both sides have the same random weights, dtype, prompts and greedy choice, and generate the same number of tokens, in alternating rounds
of one process. On a GPU transformers also runs with a static cache and its own compiled, graph-captured step. Parity stands beside every
figure: the error of the logits against a float64 copy of the model, and the tokens in common; a side that fails it has no figures.
"""

import argparse
import copy
import itertools
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llama_fast import LLM, SamplingParams
from llama_fast.engine import EMBEDDED_MODEL
from llama_fast.environment import versions
from llama_fast.kernels.parity import error_bound, relative_error

LLAMA_3 = dict(
    vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5,
    rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "125m": dict(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=2048,
    ),
    "llama-3.2-1b": LLAMA_3 | dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": LLAMA_3 | dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
    ),
}  # fmt: skip


@dataclass
class Result:
    """One side: seconds of every round and token, and its parity."""

    name: str
    first_token_s: list[float]
    inter_token_s: list[list[float]]
    relative_logit_error: float
    common_tokens: int
    passed: bool

    @property
    def token_s(self) -> float:
        return statistics.median(gap for gaps in self.inter_token_s for gap in gaps)


@dataclass(frozen=True)
class _Side:
    name: str
    generate: Callable[[], tuple[list[float], list[list[int]]]]  # the time of each token, from the start; the tokens
    logits: Callable[[Tensor], Tensor]  # (tokens, vocab) of one sequence


def measure(
    shape: str, *, dtype: torch.dtype, batch: int, prompt_tokens: int, new_tokens: int, rounds: int, device: str
) -> list[Result]:
    """Times every side in alternating rounds, after one that is not counted. The first result is transformers' own."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    model = model.to(dtype).eval()
    longest = prompt_tokens + new_tokens
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(folder)
        llm = LLM(
            folder, dtype=dtype, device=device, max_batch=batch, max_context=longest, max_cache_tokens=2 * batch * longest,
            progress=False,
        )  # fmt: skip
    prompts = torch.randint(3, model.config.vocab_size, (batch, prompt_tokens), device=device)
    sides = [_transformers(model, prompts, new_tokens, "transformers", {})]
    if device != "cpu":
        static = {"cache_implementation": "static"}
        sides.append(_transformers(model, prompts, new_tokens, "transformers, static cache + compile", static))
    sides.append(_ours(llm, prompts, new_tokens))

    texts = {side.name: side.generate()[1] for side in sides}
    results = _parity(sides, texts, model, prompts[0], dtype)
    for _ in range(rounds):
        for side, result in zip(sides, results, strict=True):
            times, _ = side.generate()
            result.first_token_s.append(times[0])
            result.inter_token_s.append([later - earlier for earlier, later in itertools.pairwise(times)])
    return results


def _transformers(model: Any, prompts: Tensor, new_tokens: int, name: str, options: dict[str, Any]) -> _Side:
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            input_ids[0, -1].item()  # on a GPU: until the token is there
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def generate() -> tuple[list[float], list[list[int]]]:
        clock, start = Clock(), time.perf_counter()
        ids = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0, stopping_criteria=[clock], **options,
        )  # fmt: skip
        return [at - start for at in clock.times], ids[:, prompts.shape[1] :].tolist()

    @torch.inference_mode()
    def logits(ids: Tensor) -> Tensor:
        return model(ids[None], use_cache=False).logits[0]  # type: ignore[no-any-return]

    return _Side(name, generate, logits)


def _ours(llm: LLM, prompts: Tensor, new_tokens: int) -> _Side:
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    texts = prompts.tolist()

    def generate() -> tuple[list[float], list[list[int]]]:
        llm.forget_prefixes()
        times: list[float] = []
        start = time.perf_counter()
        requests = [llm.submit(text, params) for text in texts]
        while not all(request.done for request in requests):
            llm.step()
            if (count := min(len(request.completion.token_ids) for request in requests)) > len(times):
                times += [time.perf_counter() - start] * (count - len(times))
        return times, [request.completion.token_ids for request in requests]

    return _Side("llama-fast", generate, llm.logits)


def _parity(
    sides: list[_Side], texts: dict[str, list[list[int]]], model: Any, prompt: Tensor, dtype: torch.dtype
) -> list[Result]:
    """Logits of the first text, against a float64 copy of the model; and how many tokens all rows have in common with the first side."""
    expected_texts = texts[sides[0].name]
    ids = torch.cat([prompt, torch.tensor(expected_texts[0], device=prompt.device)])
    reference = copy.deepcopy(model).double()
    with torch.inference_mode():
        expected = reference(ids[None], use_cache=False).logits[0]
    del reference
    errors = [relative_error(side.logits(ids), expected) for side in sides]
    results = []
    for side, error in zip(sides, errors, strict=True):
        common = min(_common_prefix(a, b) for a, b in zip(texts[side.name], expected_texts, strict=True))
        results.append(Result(side.name, [], [], error, common, error <= error_bound(errors[0], dtype)))
    return results


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def table(results: list[Result], title: str, batch: int, new_tokens: int) -> Table:
    """Medians: time to first token, inter-token latency, tokens/s, their ratio to the first result's, and parity."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("side", no_wrap=True)
    for column in ("TTFT, ms", "ITL, ms", "tokens/s", "ratio", "error", "same tokens"):
        shown.add_column(column, justify="right")
    for result in results:
        figures = ["FAIL", "", "", ""]
        if result.passed:
            figures = [
                f"{1e3 * statistics.median(result.first_token_s):.1f}", f"{1e3 * result.token_s:.2f}",
                f"{batch / result.token_s:,.1f}", f"{results[0].token_s / result.token_s:.2f}x",
            ]  # fmt: skip
        same = f"{result.common_tokens} of {new_tokens}"
        shown.add_row(result.name, *figures, f"{result.relative_logit_error:.1e}", same)
    return shown


def test_both_sides_are_measured() -> None:
    tiny = dict(SHAPES["125m"], hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    SHAPES["tiny"] = tiny | dict(num_key_value_heads=2, vocab_size=1200)
    results = measure(
        "tiny", dtype=torch.float32, batch=3, prompt_tokens=5, new_tokens=7, rounds=2,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    for result in results:
        assert result.passed
        assert result.common_tokens == 7
        assert [len(gaps) for gaps in result.inter_token_s] == [6, 6]


def main() -> None:
    """Runs one comparison, prints it, and writes all samples where `--json` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    for name, default in (("batch", 1), ("prompt-tokens", 64), ("new-tokens", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    results = measure(
        args.shape, dtype=getattr(torch, args.dtype), batch=args.batch, prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens, rounds=args.rounds, device=args.device,
    )  # fmt: skip
    title = f"{args.shape}, {args.dtype}, batch {args.batch}, {args.prompt_tokens} + {args.new_tokens} tokens, {args.device}"
    Console().print(table(results, title, args.batch, args.new_tokens))
    if args.json is not None:
        settings = {name: str(value) for name, value in vars(args).items() if name != "json"}
        record = {
            "settings": settings,
            "machine": _machine(args.device),
            "results": [asdict(result) for result in results],
        }
        args.json.write_text(json.dumps(record))


def _machine(device: str) -> dict[str, Any]:
    """What the figures depend on: processor, threads, versions, commit."""
    name = torch.cuda.get_device_name(device) if device != "cpu" else _cpu_name()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {"processor": name, "threads": torch.get_num_threads(), "commit": commit or None, **versions()}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
