"""Text to train and to evaluate on."""
