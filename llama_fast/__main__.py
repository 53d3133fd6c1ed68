"""`python -m llama_fast` is `llama-fast`."""

from .cli.main import app

app(prog_name="llama-fast")
