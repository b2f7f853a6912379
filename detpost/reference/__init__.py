"""The definition: what a decode computes, in PyTorch's own operators. Imports nothing above it."""
