"""A run as a page: curves, samples, settings."""
