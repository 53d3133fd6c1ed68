"""An evaluation for readers: a table in the terminal, and a page with the worst examples."""
