"""Where a model runs: on which device, in which dtype, and how the device's memory is shared out."""

import contextlib
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..decoder.checkpoint_layout import weight_bytes
from ..decoder.config import DecoderConfig
from ..kernels.torch_compat import DisableTorchFunction, cpu_multiplies_bfloat16
from .cache import bytes_per_token
from .memory import MemoryLedger, available_bytes
from .sampling import TABLE_BYTES

LOGPROB_ROWS = 128  # prompt tokens whose logits are there at a time: 64 MB of float32 for 128k of vocabulary

_SLOTS = 2**31  # fewer than these: kernels count a cache's tokens in 32 bits

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MEMORY_SHARE = {"cuda": 0.9, "cpu": 0.5}  # of what is free, that weights, cache and workspace may take


def check_sizes(**sizes: int | None) -> dict[str, Any]:
    """The sizes that a user names, as plain integers. Raises ValueError for what is none; those of cache and context may be None."""
    for name, value in sizes.items():
        if value is None and name in ("max_cache_tokens", "max_context"):
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= value < _SLOTS:
            raise ValueError(f"{name} must be an integer, at least 1 and under 2**31, got {value!r}")
        sizes[name] = int(value)
    return sizes


def device_of(device: str | torch.device) -> torch.device:
    """The device that a user names; "auto" is a GPU if there is one. Raises ValueError where it is not here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f'device must be "auto", "cuda", "cuda:N" or "cpu", got {device!r}') from None
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f'device must be "auto", "cuda", "cuda:N" or "cpu", got {device.type!r}')
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device {device}: PyTorch sees no GPU here; use device='cpu'")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device {device}: PyTorch sees {torch.cuda.device_count()} GPUs here, from cuda:0 on")
    return torch.device("cuda", index)


def dtype_of(dtype: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a user names; "auto" is the checkpoint's, `stored`, where the device multiplies it in hardware."""
    if dtype == "auto":
        if device.type != "cpu" or (stored == torch.bfloat16 and cpu_multiplies_bfloat16()):
            return stored
        return torch.float32
    chosen = _DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise ValueError(f"dtype must be 'auto', {', '.join(map(repr, _DTYPES))} or that torch dtype, got {dtype!r}")
    return chosen


def current(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Makes a GPU the current one, whose streams events and graphs are recorded on; nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def own_modes(device: torch.device, *, inference: bool = True) -> Iterator[None]:
    """Inside, the modes that PyTorch keeps for each thread are the engine's, whatever the caller's are.

    These are gradients and inference, autocast, the default device (which is a torch function mode, as others that a caller may
    be in: none is heard here), and on a GPU the current device and stream. The default dtype and deterministic algorithms are
    those of the whole process, and another thread's as well: nothing here depends on the one, and the other is kept.
    """
    stream = _own_stream(device) if device.type == "cuda" else contextlib.nullcontext()
    autocast = torch.is_autocast_enabled(device.type)
    plain = torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext()
    with stream, DisableTorchFunction(), torch.inference_mode(inference), plain:
        yield


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Makes a GPU's default stream the current one, behind what the caller has queued on its own, which then waits for it."""
    own, outer = torch.cuda.default_stream(device), torch.cuda.current_stream(device)
    if outer != own:
        own.wait_stream(outer)
    with torch.cuda.stream(own):
        yield
    if outer != own:
        outer.wait_stream(own)


def upload(values: Sequence[int], device: torch.device) -> Tensor:
    """The integers as an int64 tensor on the device, from pinned memory: a GPU's host does not wait for it."""
    return torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def plan_memory(
    config: DecoderConfig, dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device, *, packs: bool, max_batch: int, max_cache_tokens: int | None,
    max_context: int, step_tokens: int, block_size: int,
) -> tuple[int, MemoryLedger]:  # fmt: skip
    """How many blocks the cache has, and what the device must hold. Raises NotEnoughMemoryError before anything is made."""
    weights = weight_bytes(config, dtype)
    # activations of a step; logits in float32 with the sampler's copies of them; the sampler's tables
    widest = max(2 * config.intermediate_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    tokens = min(step_tokens, max_batch * max_context)
    workspace = tokens * (4 * config.hidden_size + 2 * widest) * dtype.itemsize
    workspace += 6 * max(max_batch, LOGPROB_ROWS) * config.vocab_size * 4
    if packs and config.tied_embeddings:  # packed as the head, plain as the embedding
        workspace += config.vocab_size * config.hidden_size * dtype.itemsize
    workspace += TABLE_BYTES * (max_batch + 1) * config.vocab_size
    available = int(available_bytes(device) * _MEMORY_SHARE[device.type])
    block_bytes = block_size * bytes_per_token(config, cache_dtype)
    if max_cache_tokens is None:
        wanted = max_batch * -(-max_context // block_size)
        room = (available - weights - workspace) // block_bytes - 1  # one block is for what nobody reads
        blocks = max(1, min(wanted, room))
    else:
        blocks = -(-max_cache_tokens // block_size)
    if (blocks + 1) * block_size >= _SLOTS:
        raise ValueError(f"max_cache_tokens must leave the cache under 2**31 tokens, got {blocks * block_size}")
    ledger = MemoryLedger(weights, (blocks + 1) * block_bytes, workspace, available)
    ledger.check()
    return blocks, ledger
