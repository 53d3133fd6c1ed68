"""OpenVINO GenAI's pipeline, with weights, arithmetic and cache in the precision that is asked for."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

VERSION = f"openvino-genai {openvino_genai.__version__}"

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVINO:
    def __init__(self, pipeline: Any, model: Path, settings: dict[str, Any]) -> None:
        self._pipeline, self._model, self._settings = pipeline, model, settings

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        start = time.perf_counter()
        done = self._pipeline.generate(inputs, config)
        seconds = time.perf_counter() - start
        # its own clock times the tokens: the last one is there when it returns
        stamps = [_seconds(x) for x in done.perf_metrics.raw_metrics.m_new_token_times]
        return [seconds - (stamps[-1] - stamp) for stamp in stamps], [list(map(int, row)) for row in done.tokens]

    def logits(self, ids: list[int]) -> Any:
        """By the same model with the same settings outside the pipeline, which gives none."""
        request = (
            openvino.Core()
            .compile_model(self._model / "openvino_model.xml", "CPU", self._settings)
            .create_infer_request()
        )
        row = np.array([ids], dtype=np.int64)
        inputs = {
            "input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }  # fmt: skip
        return request.infer(inputs)["logits"][0].astype(np.float32)


def _seconds(stamp: Any) -> float:
    return float(stamp.total_seconds() if hasattr(stamp, "total_seconds") else 1e-3 * stamp)


def load(model: str, dtype: str, threads: int, batch: int, context: int, tokens: int) -> OpenVINO:
    """`model` is a folder with the exported model and a tokenizer, which the pipeline asks for and nothing here uses."""
    precision = _PRECISIONS[dtype]
    settings = {
        "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision,
    }  # fmt: skip
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = tokens  # a prompt in one step
    scheduler.enable_prefix_caching = False  # every prompt is computed
    pipeline = openvino_genai.LLMPipeline(model, "CPU", scheduler_config=scheduler, **settings)
    return OpenVINO(pipeline, Path(model), settings)
