"""The docs site's list of every option is the command's own."""

import importlib
import re

import pytest
import typer.main

from detpost.command.cli import app


def test_every_option_of_every_command_is_there():
    pytest.importorskip("mkdocs")
    text = importlib.import_module("scripts.docs_commands").options()
    commands = typer.main.get_command(app).commands
    sections = dict(zip(*[iter(re.split(r"^## `detpost ([\w-]+)`$", text, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert sections.keys() == commands.keys()
    for name, command in commands.items():
        options = {option for given in command.params for option in given.opts if option.startswith("--")}
        assert options - {*re.findall(r"--[\w-]+", sections[name])} == set(), name
