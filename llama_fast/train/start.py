"""The model that a run begins with, and the one that it has come to."""

import hashlib
from pathlib import Path

import torch

from ..config_file import read_config
from ..decoder.checkpoint import find
from ..decoder.tokenizer import Tokenizer
from . import checkpoints, lora
from .config import TrainConfig
from .model import TrainedDecoder, load_trained


def tokenizer_of(config: TrainConfig) -> Tokenizer:
    """That of the data, or of the model. Raises ValueError if there is none."""
    if config.data.tokenizer is not None:
        return Tokenizer(config.data.tokenizer)
    assert config.model.path is not None
    return Tokenizer(find(config.model.path))


def first_model(config: TrainConfig, tokenizer: Tokenizer) -> TrainedDecoder:
    """The model before its first step, on the CPU.

    Raises:
        ValueError: it cannot be loaded, does not fit the tokenizer or the length of rows, or an adapter does not fit it.
    """
    run, sizes = config.run, config.model
    options = dict(dtype=run.torch_dtype, recompute=run.recompute, dropout=sizes.dropout)
    if sizes.path is None:
        decoder = sizes.decoder_config(tokenizer, config.batch.sequence_length)
        model = TrainedDecoder(decoder, **options)  # type: ignore[arg-type]
        model.initialise(
            seed=run.seed, std=sizes.init_std, embedding_std=sizes.embedding_std, last_norm=sizes.init_last_norm
        )
    else:
        model = load_trained(sizes.path, **options)  # type: ignore[arg-type]
        _check(model, config, tokenizer)
    if run.weights == "bfloat16":
        model = model.to(torch.bfloat16)
    if config.lora is not None:
        lora.add(model, config.lora, seed=run.seed)
    return model


def _check(model: TrainedDecoder, config: TrainConfig, tokenizer: Tokenizer) -> None:
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"{config.model.path} has {model.config.vocab_size:,} tokens, and {tokenizer.folder} {tokenizer.vocab_size:,}: "
            "tokenise with the model's own tokenizer"
        )
    if model.config.max_positions < config.batch.sequence_length:
        raise ValueError(
            f"batch.sequence_length must be at most {model.config.max_positions}, got {config.batch.sequence_length}"
        )


def model_of(run: Path, checkpoint: Path) -> tuple[TrainedDecoder, TrainConfig]:
    """The model of a run's checkpoint, with its adapters if it has them, and the run's config.

    Raises:
        ValueError: the model that was adapted is no longer where it was, or is another one.
    """
    config = read_config(run / "config.toml", TrainConfig)
    if config.lora is None:
        return checkpoints.load_weights(checkpoint), config
    model = first_model(config, Tokenizer(run / "tokenizer"))
    checkpoints.load_learnt(checkpoint, model)
    return model, config


def fingerprint(model: TrainedDecoder) -> str:
    """sha256 of the shapes and of some elements of the weights that stay as they are."""
    digest = hashlib.sha256()
    for name, each in model.named_parameters():
        if not each.requires_grad:
            digest.update(f"{name} {tuple(each.shape)}".encode())
            digest.update(each.detach().flatten()[::997].float().numpy().tobytes())
    return digest.hexdigest()
