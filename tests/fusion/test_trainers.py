"""Other people's trainers on a fused model: the losses of the plain one."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from llama_fast import fuse
from llama_fast.engine.llm import EMBEDDED_MODEL
from tests.parity import not_interpreted
from tests.train.test_model import Calls

pytestmark = [
    not_interpreted,
    pytest.mark.filterwarnings("ignore"),  # theirs: of their own deprecations, and of a CPU
]

BOUND = 2e-6
STEPS = 3
CHATS = [
    [
        dict(role="user", content=f"What is {i} and {i}?"),
        dict(role="assistant", content=f"It is {2 * i}." * (i % 3 + 1)),
    ]
    for i in range(12)
]


class Recorder:
    """Keeps the loss of each micro-batch as it is, where the log rounds it."""

    def training_step(self, *arguments, **options):
        loss = super().training_step(*arguments, **options)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


class Plain(Recorder, Trainer):
    pass


class Sft(Recorder, SFTTrainer):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def common(folder, **settings):
    return dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=1,
    ) | settings  # fmt: skip


def trainer_losses(plain, folder, tokenizer, **settings):
    ids = torch.randint(len(tokenizer), (16, 40), generator=torch.Generator().manual_seed(2)).tolist()
    data = Dataset.from_dict(dict(input_ids=ids, labels=ids))
    trainer = Plain(plain, TrainingArguments(**common(folder, **settings)), train_dataset=data)
    trainer.train()
    return trainer.losses


def sft_losses(plain, folder, tokenizer, lora=False, **settings):
    data = Dataset.from_dict(dict(messages=CHATS))
    options = dict(bf16=False, gradient_checkpointing=False, max_length=128) | settings
    config = SFTConfig(**common(folder, **options))
    adapter = LoraConfig(r=4, target_modules="all-linear") if lora else None
    trainer = Sft(plain, config, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
    trainer.train()
    return trainer.losses


def nightly(*values, **options):
    return pytest.param(*values, marks=pytest.mark.nightly, **options)


@pytest.mark.parametrize(
    ("losses", "settings"),
    [
        pytest.param(trainer_losses, dict(gradient_accumulation_steps=2, label_smoothing_factor=0.1), id="Trainer, accumulation, smoothing"),
        nightly(trainer_losses, dict(gradient_checkpointing=True), id="Trainer, checkpointing"),
        nightly(trainer_losses, dict(torch_compile=True), id="Trainer, compile"),
        pytest.param(sft_losses, dict(lora=True, assistant_only_loss=True), id="TRL, LoRA, chats"),
        nightly(sft_losses, dict(packing=True, gradient_checkpointing=True), id="TRL, packing, checkpointing"),
    ],
)  # fmt: skip
def test_losses_are_those_of_the_plain_model(tokenizer, tmp_path, losses, settings):
    plain = model(tokenizer)
    fused = copy.deepcopy(plain)
    fuse(fused, mode="training")
    torch.manual_seed(0)
    expected = losses(plain, tmp_path, tokenizer, **settings)
    torch.manual_seed(0)
    with Calls() as calls:
        found = losses(fused, tmp_path, tokenizer, **settings)
    assert len(found) == len(expected) >= STEPS and found == pytest.approx(expected, rel=BOUND)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)
    if "torch_compile" not in settings:
        assert calls.counted["attention"] and calls.counted["rms_norm"] + calls.counted["add_rms_norm"]
    # TRL computes the loss itself, from the hidden states, in chunks
    assert bool(calls.counted["linear_cross_entropy"]) == (
        losses is trainer_losses and not settings.get("label_smoothing_factor")
    )


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["trainer", "fsdp"])
def test_losses_on_two_ranks(tmp_path, kind):
    """DDP by the Trainer, and FSDP2 around layers that are fused already."""
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.fusion.on_two_ranks",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, kind, tmp_path], capture_output=True, text=True, env=environment, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("[["))
    expected, found = json.loads(line)
    assert len(expected) == STEPS and found == pytest.approx(expected, rel=BOUND)
