"""Triton forms, on CUDA, and the trial that they pass before they are used."""
