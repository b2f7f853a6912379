"""What is written for speed in PyTorch's own operators: for any device, and for graphs that other runtimes read."""
