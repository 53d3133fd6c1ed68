"""The checkpoint dream-260k, a small trained LLaMA that is not of this project: in the folder that LLAMA_FAST_CHECKPOINTS names."""

import os
from pathlib import Path

import pytest

DREAM = Path(os.environ.get("LLAMA_FAST_CHECKPOINTS", "/nowhere")) / "dream-260k"
needs_dream = pytest.mark.skipif(not DREAM.is_dir(), reason="dream-260k is not in the folder LLAMA_FAST_CHECKPOINTS")
