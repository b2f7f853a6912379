"""C++ and NumPy forms, on the CPU."""
