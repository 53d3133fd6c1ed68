"""What is run on several ranks: `torchrun -m tests.train.rank_checks FOLDER CHECK...`, all checks in one process group.

FOLDER has a train.toml, and takes the runs, which the tests then look at.
"""

import os
import resource
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from llama_fast.config_file import read_config
from llama_fast.decoder.config import DecoderConfig
from llama_fast.train import checkpoints, tensor_parallel
from llama_fast.train.config import OptimizerConfig, TrainConfig
from llama_fast.train.loop import train
from llama_fast.train.model import Packed, TrainedDecoder
from llama_fast.train.optimizer import Optimizers, clip, gradient_norm
from llama_fast.train.ranks import ALONE, Ranks

ODD = (
    "model.hidden_size=60", "model.intermediate_size=101", "model.head_dim=16", "batch.micro_batches=3",
    "run.dtype=bfloat16", "run.recompute=selective", "optimizer.kind=muon",
)  # fmt: skip
"""Rows and micro-batches that no two ranks share evenly, and matrices that Muon wants whole."""
ADAPTED = ("lora.rank=4", "lora.dropout=0.1", "model.dropout=0.1", "run.weights=bfloat16", "run.dtype=bfloat16")
UNSAVED = ("run.save_every=0", "run.evaluate_every=3")
EIGHT = (*UNSAVED, "batch.rows=1", "batch.micro_batches=8")
"""So many that two ranks sum theirs over turns in another order, if it is not in pairs."""


def run(folder: Path, name: str, *settings: str, file: str = "train.toml") -> TrainConfig:
    return read_config(folder / file, TrainConfig, [f"run.out={folder / name}", *settings])


def at_call(monkeypatch: pytest.MonkeyPatch, rank: int, number: int, act) -> None:
    """Gives the loss of the model's `number`-th call in training, on this rank, to `act`, and goes on with what it returns."""
    forward, seen = TrainedDecoder.forward, []

    def watched(model, *arguments, **options):
        loss = forward(model, *arguments, **options)
        if torch.is_grad_enabled():
            seen.append(None)
            if dist.get_rank() == rank and len(seen) - 1 == number:
                return act(loss)
        return loss

    monkeypatch.setattr(TrainedDecoder, "forward", watched)


def ask_to_stop(loss):
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


def stopped(folder, monkeypatch):
    """The last rank alone is asked to, in the third step: all save after it."""
    at_call(monkeypatch, dist.get_world_size() - 1, 2 * (8 // dist.get_world_size()), ask_to_stop)
    outcome = train(run(folder, "stopped", *EIGHT))
    assert (outcome.interrupted, outcome.progress.step) == (signal.SIGTERM, 3), outcome


def gone_on(folder, monkeypatch):
    """A run that was stopped so by other ranks."""
    assert train(run(folder, "stopped", *EIGHT)).progress.step == 6


def odd(folder, monkeypatch):
    """One that one process has begun."""
    assert train(run(folder, "odd", *ODD, *UNSAVED)).progress.step == 6


def adapted(folder, monkeypatch):
    """Another that one process has begun: adapters of a model in bfloat16, with dropout."""
    assert train(run(folder, "adapted", *ADAPTED, *UNSAVED, file="adapted.toml")).progress.step == 6


def not_a_number(folder, monkeypatch):
    """The loss of one micro-batch of the second step, on the last rank."""
    _not_a_number(folder, "nan", monkeypatch)


def fused(folder, monkeypatch):
    """The same, with the optimizer of a GPU."""
    monkeypatch.setattr("llama_fast.train.optimizer.FUSED_ON", ("cpu",))
    _not_a_number(folder, "fused", monkeypatch)


def _not_a_number(folder, name, monkeypatch):
    at_call(monkeypatch, dist.get_world_size() - 1, 4 // dist.get_world_size(), lambda loss: loss * float("nan"))
    made = run(folder, name, "run.save_every=1", "run.keep=9", "run.evaluate_every=0", "schedule.steps=3")
    progress = train(made).progress
    assert (progress.step, progress.skipped) == (3, 1), progress


def full_disk(folder, monkeypatch):
    """Of the last rank, at the first checkpoint: no file may be longer than 10 kB."""
    write, limits = checkpoints.save_tensors, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*arguments, **options):
        monkeypatch.setattr(checkpoints, "save_tensors", write)
        if dist.get_rank() == dist.get_world_size() - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            write(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoints, "save_tensors", full)
    said = []
    train(run(folder, "full", "run.evaluate_every=0", "schedule.steps=4"), show=said.append)
    (folder / f"said.{dist.get_rank()}").write_text("\n".join(said))


def three(folder, monkeypatch):
    said = []
    train(run(folder, "three", *EIGHT), show=said.append)
    assert dist.get_rank() or "on 3 ranks of 1 thread: right, but not to the bits of one process" in said, said


SIZES = dict(
    vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA = dict(model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **SIZES)
QWEN = dict(model_type="qwen3", head_dim=16, tie_word_embeddings=False, **SIZES)


def tensor_parallel_losses(folder, monkeypatch):
    """30 steps of two ranks to a micro-batch, which compute some of it again, beside those of the whole model: in float64 and float32."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    ranks = Ranks(mesh)
    for sizes, dtype, bound, recompute in (
        (LLAMA, torch.float64, 1e-12, "selective"), (QWEN, torch.float32, 1e-6, "full"),
    ):  # fmt: skip
        whole, parts = (
            TrainedDecoder(DecoderConfig.from_huggingface(sizes), dtype=dtype, recompute=how).to(dtype)
            for how in ("none", recompute)
        )
        for model in (whole, parts):
            model.initialise(seed=1, std=0.1)
        tensor_parallel.cut(parts, mesh["tp"])
        ranks.shard(parts, list(parts.model.layers), exact=True)
        assert parts.model.layers[0].mlp.up_proj.weight.to_local().shape == (96 // 2 // ranks.count, 64)
        alone = losses(whole, ALONE)
        for ours, theirs in zip(losses(parts, ranks), alone, strict=True):
            assert ours == pytest.approx(theirs, rel=bound), (dtype, ours, theirs)
        assert alone[-1] < 0.9 * alone[0]
    with pytest.raises(ValueError, match=r"ranks.tensor_parallel must divide num_kv_heads \(1\), got 2"):
        tensor_parallel.cut(
            TrainedDecoder(DecoderConfig.from_huggingface(LLAMA | dict(num_key_value_heads=1))), mesh["tp"]
        )


def losses(model, ranks):
    optimizers = Optimizers(model, OptimizerConfig(lr=1e-3))
    parameters, found = list(model.parameters()), []
    ids = torch.randint(131, (2, 64), generator=torch.Generator().manual_seed(1))
    for _ in range(30):
        labels = ids.roll(-1, 1)
        turns, own = ranks.turns(2), {}
        for number in turns:
            loss = model(Packed.of(ids[number], [40, 24]), labels[number]) / 128
            loss.backward()
            own[number] = loss.detach()
        found.append(ranks.gathered(own, 2, torch.device("cpu")).sum().item())
        clip(parameters, gradient_norm(parameters, ranks), 1.0)
        optimizers.step(1.0, skip=torch.tensor(False))
    return found


def both_kinds(folder, monkeypatch):
    """2 x 2 ranks by the trainer, from a checkpoint of theirs on."""
    at_call(monkeypatch, 3, 2 * (8 // 2), ask_to_stop)
    for step in (3, 6):
        assert train(run(folder, "both", *EIGHT, "ranks.tensor_parallel=2")).progress.step == step


def compiled(folder, monkeypatch):
    """Layers by `torch.compile`: two ranks that take turns, and two to a micro-batch."""
    for count in (1, 2):
        train(run(folder, f"compiled {count}", *EIGHT, "run.compile=true", f"ranks.tensor_parallel={count}"))


def main() -> None:
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            globals()[name](folder, monkeypatch)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
