"""Where the time of a generated token goes, and how far it is from what the machine can do: limits, timing, profile."""
