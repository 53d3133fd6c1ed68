"""llama.cpp by its C functions, as its own tools call it: the classes of llama-cpp-python decode one sequence at a time."""

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np

VERSION = f"llama-cpp-python {llama_cpp.__version__}"

_BF16 = 30  # GGML_TYPE_BF16, which the package does not name
# of the cache, and whether attention is fused: the fused one computes in float16, whatever the cache is (logits of float32 are off by 7e-4)
_ATTENTION = {
    "float32": (llama_cpp.GGML_TYPE_F32, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED),
    "bfloat16": (_BF16, llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO),
}


class LlamaCpp:
    def __init__(self, context: Any, vocab: int, batch: int, tokens: int) -> None:
        self._context, self._vocab = context, vocab
        self._batch = _Batch(tokens, batch)

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        rows, length = np.array(prompts, dtype=np.int32), len(prompts[0])
        sequences = np.arange(len(rows))
        last = np.zeros(length, dtype=bool)
        last[-1] = True
        times, chosen = [], []
        start = time.perf_counter()
        ids = self._decode(
            rows.reshape(-1),
            np.tile(np.arange(length), len(rows)),
            np.repeat(sequences, length),
            np.tile(last, len(rows)),
        ).argmax(1)
        for position in range(length, length + new):
            times.append(time.perf_counter() - start)
            chosen.append(ids)
            if len(chosen) < new:
                ids = self._decode(ids, position, sequences, True).argmax(1)
        return times, np.stack(chosen, axis=1).tolist()

    def logits(self, ids: list[int]) -> Any:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        return self._decode(np.array(ids), np.arange(len(ids)), np.zeros(len(ids), dtype=int), True).copy()

    def _decode(self, tokens: Any, positions: Any, sequences: Any, wanted: Any) -> Any:
        """The logits of those tokens that are `wanted`, a view."""
        count = self._batch.fill(tokens, positions, sequences, wanted)
        status = llama_cpp.llama_decode(self._context, self._batch.struct)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (count, self._vocab))


class _Batch:
    """A `llama_batch` whose fields numpy fills: one by one by ctypes they would take a part of what is measured."""

    def __init__(self, tokens: int, sequences: int) -> None:
        self.struct = llama_cpp.llama_batch_init(tokens, 0, 1)
        view = np.ctypeslib.as_array
        self._tokens, self._positions = (view(x, (tokens,)) for x in (self.struct.token, self.struct.pos))
        self._wanted = view(self.struct.logits, (tokens,))
        view(self.struct.n_seq_id, (tokens,))[:] = 1
        # the list of a token's sequences has one number: where that lies
        self._lists = view(ctypes.cast(self.struct.seq_id, ctypes.POINTER(ctypes.c_uint64)), (tokens,))
        self._numbers = np.arange(sequences, dtype=np.int32)

    def fill(self, tokens: Any, positions: Any, sequences: Any, wanted: Any) -> int:
        """Takes the tokens; returns of how many the logits are wanted."""
        count = self.struct.n_tokens = len(tokens)
        self._tokens[:count], self._positions[:count], self._wanted[:count] = tokens, positions, wanted
        self._lists[:count] = self._numbers.ctypes.data + sequences * self._numbers.itemsize
        return int(self._wanted[:count].sum())


def load(model: str, dtype: str, threads: int, batch: int, context: int, tokens: int) -> LlamaCpp:
    """`model` is a .gguf file with weights of `dtype`. The cache holds `batch` sequences, `tokens` in all."""
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    if not loaded:
        raise RuntimeError(f"llama.cpp cannot load {model}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = tokens, batch, True
    params.n_batch = tokens
    params.n_threads = params.n_threads_batch = threads
    cache, params.flash_attn_type = _ATTENTION[dtype]
    params.type_k = params.type_v = cache
    made = llama_cpp.llama_init_from_model(loaded, params)
    if not made:
        raise RuntimeError("llama.cpp cannot make a context")
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    return LlamaCpp(made, vocab, batch, tokens)
