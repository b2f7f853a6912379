"""Folders as they are: links to themselves, circles of links, places that may not be read, things that are no files."""

import csv
import os
import socket
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from detpost.command.cli import app
from detpost.runs import find_images as subject
from detpost.runs.find_images import find_images
from detpost.zoo import sample_images


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample_images()[0].read_bytes())


@pytest.fixture
def barred(monkeypatch):
    """Bar folders of this name to whoever runs the tests, root included."""
    scan = os.scandir

    def scandir(path):
        if Path(path).name == "barred":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(subject.os, "scandir", scandir)


def test_a_link_to_itself_ends_nothing(tmp_path):
    touch(tmp_path / "a.png", tmp_path / "z" / "b.png")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "ping").symlink_to("pong")
    (tmp_path / "pong").symlink_to("ping")
    for source in (tmp_path, tmp_path / "**", tmp_path / "**" / "*.png"):
        assert find_images([source]).names == ["a.png", "self.png", "z/b.png"]
    out = tmp_path.parent / f"{tmp_path.name}-out"
    shown = CliRunner().invoke(app, ["detect", str(tmp_path), "--out", str(out), "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "skipped self.png: Too many levels of symbolic links" in shown.output
    assert "3 images: 3 now, 0 before, 1 skipped" in shown.output


def test_links_among_folders_come_to_an_end_and_do_not_multiply(tmp_path):
    folders = [tmp_path / f"d{number}" for number in range(12)]
    for folder in folders:
        touch(folder / "x.png")
    for folder in folders:
        for other in folders:
            (folder / f"to-{other.name}").symlink_to(other)
    names = find_images([tmp_path]).names
    assert [name for name in names if name.count("/") == 1] == sorted(f"d{number}/x.png" for number in range(12))
    # Each of the 12 * 11 links to another folder is followed, and within it each folder is taken once.
    assert 12 * 11 < len(names) <= 12 * 11 * 12
    assert find_images([tmp_path / "**"]).names == sorted(f"d{number}/x.png" for number in range(12))


def test_a_folder_that_is_linked_twice_is_taken_under_both_names(tmp_path):
    touch(tmp_path / "elsewhere" / "sub" / "x.png")
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "train" / "cats").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "cats").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "in")
    assert find_images([tmp_path / "in"]).names == ["cats/sub/x.png", "train/cats/sub/x.png"]


@pytest.mark.slow
def test_a_tree_deeper_than_pythons_stack_is_searched(tmp_path):
    deepest = tmp_path.joinpath(*("d" * 1100))
    where = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=where)
        where, above = os.open("d", os.O_RDONLY, dir_fd=where), where
        os.close(above)
    os.close(where)
    try:
        touch(deepest / "x.png")
        assert find_images([tmp_path]).names == ["d/" * 1100 + "x.png"]
        assert find_images([tmp_path / "**" / "x.png"]).names == ["d/" * 1100 + "x.png"]
    finally:
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # shutil's recursion is not deep enough


def test_a_folder_that_cannot_be_looked_into_is_named_and_the_rest_is_found(tmp_path, barred):
    touch(tmp_path / "in" / "a.png", tmp_path / "in" / "sub" / "b.png", tmp_path / "in" / "sub" / "barred" / "c.png")
    for source in (tmp_path / "in", tmp_path / "in" / "**" / "*.png"):
        found = find_images([source])
        assert found.names == ["a.png", "sub/b.png"]
        assert found.unread == (("sub/barred/", "Permission denied"),)
    with pytest.raises(OSError, match=r"cannot look into '.*barred': Permission denied"):
        find_images([tmp_path / "in" / "sub" / "barred"])
    arguments = ["detect", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "skipped sub/barred/: Permission denied" in shown.output
    assert "2 images: 2 now, 0 before, 1 skipped" in shown.output
    with (tmp_path / "out" / "skipped.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["file_name", "reason"], ["sub/barred/", "Permission denied"]]
    assert CliRunner().invoke(app, [*arguments, "--strict"]).exit_code == 1


def test_what_is_no_regular_file_is_skipped_with_the_reason(tmp_path):
    images = tmp_path / "in"
    touch(images / "a.png")
    os.mkfifo(images / "pipe.png")
    (images / "zero.png").symlink_to("/dev/zero")
    (images / "gone.png").symlink_to("nowhere")
    (images / "folder.png").mkdir()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(images / "socket.png"))
    result = CliRunner().invoke(app, ["detect", str(images), "--out", str(tmp_path / "out"), "--device", "cpu"])
    listening.close()
    assert result.exit_code == 0, result.output
    for line in (
        *(f"skipped {name}.png: not a regular file" for name in ("pipe", "zero", "socket")),
        "skipped gone.png: a link to a file that does not exist",
        "5 images: 5 now, 0 before, 4 skipped",
    ):
        assert line in result.output


def test_patterns_match_as_the_shells_do(tmp_path):
    touch(
        *(tmp_path / name for name in ("a.png", "b.PNG", ".h.png", "s/c.png", "s/t/d.jpg", "s/.g/e.png", "s/t/n.txt"))
    )
    touch(tmp_path / "list[1].png")
    (tmp_path / "link").symlink_to(tmp_path / "s")

    def found(pattern):
        return find_images([tmp_path / pattern]).names

    assert found("*.png") == ["a.png", "list[1].png"]
    assert found("*") == ["a.png", "b.PNG", "list[1].png"]
    assert found("?.*") == ["a.png", "b.PNG"]
    assert found("*/*.png") == ["link/c.png", "s/c.png"]
    assert found("**") == ["a.png", "b.PNG", "list[1].png", "s/c.png", "s/t/d.jpg"]
    assert found("**/*.jpg") == ["s/t/d.jpg"]
    assert found("**/t/*") == ["s/t/d.jpg"]
    assert found("s/**/*.txt") == ["t/n.txt"]
    assert found("**/.*/*.png") == ["s/.g/e.png"]
    assert found(".*") == [".h.png"]
    assert found("list[[]1].png") == ["list[1].png"]
    assert found("**/**/c.png") == ["s/c.png"]
    with pytest.raises(ValueError, match="no file matches"):
        found("s/*.gif")


def test_pictures_of_an_earlier_run_are_no_input(tmp_path):
    touch(tmp_path / "a.png", tmp_path / "out" / "pictures" / "a.png")
    (tmp_path / "out" / "pictures" / subject.MARKER).touch()
    assert find_images([tmp_path]).names == ["a.png"]
    assert find_images([tmp_path / "**" / "*.png"]).names == ["a.png"]
    Image.new("L", (2, 2)).save(tmp_path / "out" / "b.png")
    assert find_images([tmp_path]).names == ["a.png", "out/b.png"]
