"""Run by torchrun: losses of a plain and of a fused model, `python on_two_ranks.py trainer|fsdp FOLDER`; rank 0 prints them as JSON.

Both are computed in one process, one after the other, so that the ranks are the same.
"""

import copy
import json
import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer

from llama_fast import fuse
from llama_fast.engine.llm import EMBEDDED_MODEL
from tests.fusion.test_trainers import STEPS, model, trainer_losses


def fsdp_losses(plain, ids):
    for layer in [*plain.model.layers, plain]:
        fully_shard(layer)
        layer.set_force_sum_reduction_for_comms(True)
        layer.set_gradient_divide_factor(1.0)
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-3)
    losses = []
    for _ in range(STEPS):
        loss = plain(ids, labels=ids).loss / dist.get_world_size()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(kind: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    plain = model(tokenizer)
    fused = copy.deepcopy(plain)
    fuse(fused, mode="training")
    if kind == "fsdp":
        dist.init_process_group("gloo")
        ids = torch.randint(len(tokenizer), (2, 40), generator=torch.Generator().manual_seed(dist.get_rank()))
        found = [fsdp_losses(each, ids) for each in (plain, fused)]
    else:
        found = [trainer_losses(each, folder, tokenizer, ddp_backend="gloo") for each in (plain, fused)]
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
