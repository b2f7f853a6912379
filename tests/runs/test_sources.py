"""Where the images of a distributed run are: folders with names of any kind, addresses, files that hold many."""

import os
import shutil

import pytest

pytest.importorskip("pyarrow")

from detpost.runs.sources import list_images, packed_files
from detpost.zoo import sample_images


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", os.fsdecode(b"a\xff.png")):
        shutil.copy(sample_images()[0], tmp_path / name)
    return tmp_path


def test_a_name_that_is_not_utf8_is_one_of_a_folder_of_images(folder):
    assert packed_files([folder]) is None
    assert list_images([folder]).names == [os.fsdecode(b"a\xff.png"), "b.png"]


def test_a_folder_of_packed_files_is_found_whatever_else_is_in_it(tmp_path):
    for name in (b"y.parquet", b"x.parquet", b"note\xff.txt"):
        (tmp_path / os.fsdecode(name)).touch()
    kind, paths, _ = packed_files([tmp_path])
    assert kind == "parquet"
    assert paths == [str(tmp_path / "x.parquet"), str(tmp_path / "y.parquet")]
    assert packed_files([tmp_path / "x.parquet"])[:2] == ("parquet", [str(tmp_path / "x.parquet")])


def test_an_address_of_this_machine_is_its_folder(folder):
    listing = list_images([folder.as_uri()])
    assert listing[1:] == list_images([folder])[1:]
    assert listing.place.path == str(folder)
    with pytest.raises(FileNotFoundError, match="no image or folder at"):
        list_images([(folder / "missing").as_uri()])
