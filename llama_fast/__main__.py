"""`python -m llama_fast` is `llama-fast`."""

from .cli import app

app(prog_name="llama-fast")
