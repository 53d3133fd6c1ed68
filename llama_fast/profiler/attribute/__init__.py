"""Where the time went: the work of each op, and the kernels that did it."""
