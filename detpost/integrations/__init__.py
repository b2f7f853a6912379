"""Bridges to the libraries that people already use, each imported only when asked for."""
