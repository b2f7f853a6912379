"""``python -m detpost`` is the ``detpost`` command."""

from detpost.cli import main

main()
