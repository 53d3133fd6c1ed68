"""`torchrun --nproc-per-node 2 -m llama_fast.train CONFIG` is `llama-fast train CONFIG` on two ranks."""

import sys

from ..cli.main import app

app(["train", *sys.argv[1:]], prog_name="llama-fast")
