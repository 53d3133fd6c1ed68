"""A profile for readers: in a terminal and as a page."""
