"""CUDA graphs of the decoding step: model, sampling and all, launched by the host as one."""

from collections.abc import Callable

import torch

from .paged import StepInputs
from .sampling import Sampled

Step = Callable[[StepInputs], Sampled]


class DecodingGraph:
    """A captured step for so many rows and so many blocks a row.

    It reads where it read when it was captured: `replay` copies its inputs there. The cache, the weights and the sampler's tables
    must stay where they are.
    """

    def __init__(self, step: Step, inputs: StepInputs) -> None:
        """Captures `step`. The inputs given must be those of padding rows: the warm-up before the capture runs them."""
        self._inputs = inputs
        stream = torch.cuda.Stream(inputs.token_ids.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles what was not compiled yet, which a capture cannot
            for _ in range(2):
                step(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._sampled = step(inputs)

    def replay(self, inputs: StepInputs) -> Sampled:
        """What the next replay overwrites: the caller copies it before."""
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._sampled
