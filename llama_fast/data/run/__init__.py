"""From a configuration to shards: which steps run, on which machines, and what stands on disk between them."""
