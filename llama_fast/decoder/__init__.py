"""What a LLaMA is: its numbers, its layers, its checkpoints and its tokenizer."""
