"""GGUF files, as llama.cpp writes them: a whole model in one file, usually quantised."""
