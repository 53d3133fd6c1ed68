"""The model that a run begins with, and the one that it has come to."""

import hashlib
from pathlib import Path

import torch

from ..config_file import read_config
from ..decoder.checkpoint import find, load, open_checkpoint
from ..decoder.checkpoint_layout import huggingface_slots
from ..decoder.config import DecoderConfig
from ..decoder.model import Decoder
from ..decoder.tokenizer import Tokenizer
from . import checkpoints, lora
from .config import TrainConfig
from .model import TrainedDecoder

BASE = "model.path"
"""What a checkpoint of adapters calls the fingerprint of the model that they stand beside."""


def tokenizer_of(config: TrainConfig) -> Tokenizer:
    """That of the data, or of the model. Raises ValueError if there is none."""
    if config.data.tokenizer is not None:
        return Tokenizer(config.data.tokenizer)
    assert config.model.path is not None
    return Tokenizer(find(config.model.path))


def first_model(config: TrainConfig, tokenizer: Tokenizer) -> TrainedDecoder:
    """The model of a run before it has weights: its parameters are on the meta device, so that ranks can share out one that none could hold.

    Raises:
        ValueError: there is none, it does not fit the tokenizer or the length of rows, or an adapter does not fit it.
    """
    run, sizes = config.run, config.model
    if sizes.path is None:
        decoder = sizes.decoder_config(tokenizer, config.batch.sequence_length)
    else:
        decoder = open_checkpoint(find(sizes.path)).config
        _check(decoder, config, tokenizer)
    with torch.device("meta"):
        model = TrainedDecoder(decoder, dtype=run.torch_dtype, recompute=run.recompute, dropout=sizes.dropout)
        if run.weights == "bfloat16":
            model = model.to(torch.bfloat16)
        if config.lora is not None:
            lora.add(model, config.lora)
    return model


def fill(model: TrainedDecoder, config: TrainConfig) -> str | None:
    """Gives it the weights it begins with. Of a model that is there each rank reads all into its memory, and lets it go.

    Returns:
        The fingerprint of the model that adapters stand beside, None without adapters.

    Raises:
        ValueError: it cannot be loaded, or an adapter's weights do not fit it.
    """
    seed, sizes = config.run.seed, config.model
    if sizes.path is None:
        model.initialise(
            seed=seed, std=sizes.init_std, embedding_std=sizes.embedding_std, last_norm=sizes.init_last_norm
        )
        return None
    decoder = load(find(sizes.path), device="cpu", dtype=torch.float32)
    model.fill(decoder)
    if config.lora is None:
        return None
    lora.fill(model, config.lora, seed=seed)
    return _fingerprint(model, decoder)


def _check(decoder: DecoderConfig, config: TrainConfig, tokenizer: Tokenizer) -> None:
    if decoder.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"{config.model.path} has {decoder.vocab_size:,} tokens, and {tokenizer.folder} {tokenizer.vocab_size:,}: "
            "tokenise with the model's own tokenizer"
        )
    if decoder.max_positions < config.batch.sequence_length:
        raise ValueError(
            f"batch.sequence_length must be at most {decoder.max_positions}, got {config.batch.sequence_length}"
        )


def model_of(run: Path, checkpoint: Path) -> tuple[TrainedDecoder, TrainConfig]:
    """The model of a run's checkpoint, with its adapters if it has them, and the run's config.

    Raises:
        ValueError: the model that was adapted is no longer where it was, or is another one.
    """
    config = read_config(run / "config.toml", TrainConfig)
    if config.lora is None:
        return checkpoints.load_weights(checkpoint), config
    model = first_model(config, Tokenizer(run / "tokenizer")).to_empty(device="cpu")
    checkpoints.check_origin(checkpoint, {BASE: fill(model, config)})
    checkpoints.load_learnt(checkpoint, model)
    return model, config


def _fingerprint(model: TrainedDecoder, decoder: Decoder) -> str:
    """sha256 of the shapes and of some elements of the weights that the model has from this decoder."""
    digest, slots = hashlib.sha256(), huggingface_slots(decoder.config)
    for name, parameter in model.named_parameters():
        if name in slots:
            digest.update(f"{name} {slots[name].shape}".encode())
            some = slots[name].of(decoder).flatten()[::997].to(parameter.dtype)
            digest.update(some.float().numpy().tobytes())
    return digest.hexdigest()
