"""``python -m detpost`` is the ``detpost`` command."""

from detpost.command.cli import main

main()
