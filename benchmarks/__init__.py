"""Times and memory beside the peers: `python -m benchmarks`."""
