"""The `detpost` command: what a person types."""
