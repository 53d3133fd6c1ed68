"""`python openvino_export.py CHECKPOINT FOLDER DTYPE`: a checkpoint of transformers as a model for OpenVINO, with weights of DTYPE.

Run by the Python of OpenVINO's environment, where nothing of this project is installed.
"""

import sys

import torch
from optimum.intel import OVModelForCausalLM


def main(checkpoint: str, folder: str, dtype: str) -> None:
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, load_in_8bit=False, dtype=getattr(torch, dtype)
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
