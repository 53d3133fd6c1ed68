"""How good a model is: perplexity and bits per byte, scores of texts, tasks with answers, and intervals on all of them."""
