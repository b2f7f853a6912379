"""Cut anywhere, a journal holds whole batches and nothing else."""

import os
import sys
from pathlib import Path

import pytest

import detpost.runs.journal as subject
from detpost.runs.journal import Journal


def row(name, number, **more):
    return {"file_name": name, "image_id": number, "size": 1, "mtime_ns": 2, **more}


BATCHES = [[row("a", 1), row("b\n\udcff", 2, scores=[0.1])], [row("c", 3)], [row("d", 4), row("e", 5), row("f", 6)]]


def test_cut_at_any_byte_it_opens_with_the_batches_that_were_whole(tmp_path):
    with Journal(tmp_path / "journal") as journal:
        journal.start({"threshold": 0.25})
        ends = [(tmp_path / "journal").stat().st_size]
        for batch in BATCHES:
            journal.append(batch)
            ends.append((tmp_path / "journal").stat().st_size)
    whole = (tmp_path / "journal").read_bytes()
    for cut in range(len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:cut])
        with Journal(path) as journal:
            count = sum(end <= cut for end in ends)
            assert (journal.header is not None) == (count > 0)
            kept = [each for batch in BATCHES[: max(0, count - 1)] for each in batch]
            names = [each["file_name"] for each in kept]
            assert list(journal.entries) == names
            rows = [{key: value for key, value in each.items() if key != "left"} for each in journal.rows(names)]
            assert rows == kept
            if count:
                for batch in BATCHES[count - 1 :]:
                    journal.append(batch)
        if count:
            assert path.read_bytes() == whole
        else:
            assert not path.exists()


def test_the_last_line_of_an_image_holds(tmp_path):
    for names in (["a"], ["a", "b"]):
        with Journal(tmp_path / "journal") as journal:
            if journal.header is None:
                journal.start({})
            journal.append([row(name, 1, turn=len(names)) for name in names])
    with Journal(tmp_path / "journal") as journal:
        assert [each["turn"] for each in journal.rows(["a"])] == [2]


def test_a_file_that_is_no_journal_is_left_alone(tmp_path):
    for text in ("my notes\nmore\n", '{"journal": 99}\n', "[]\n"):
        (tmp_path / "journal").write_text(text)
        with pytest.raises(ValueError, match="is not a journal of this version"):
            Journal(tmp_path / "journal")
        assert (tmp_path / "journal").read_text() == text


def test_two_cannot_write_at_once(tmp_path):
    with Journal(tmp_path / "journal") as journal:
        journal.start({})
        with pytest.raises(ValueError, match="another run is writing to") as caught:
            Journal(tmp_path / "journal")
        assert "\n" not in str(caught.value)
    Journal(tmp_path / "journal").close()


def test_where_open_files_cannot_be_removed_an_empty_journal_goes_once_it_is_closed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    journal = Journal(tmp_path / "journal")
    unlink = Path.unlink

    def as_on_windows(path, missing_ok=False):
        if not journal._file.closed:
            raise PermissionError(13, "The process cannot access the file because it is being used", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", as_on_windows)
    journal.close()
    assert not (tmp_path / "journal").exists()
    journal.close()  # once more is nothing


def test_an_empty_journal_goes_while_its_lock_holds(tmp_path, monkeypatch):
    unlink, seen = Path.unlink, []

    def another_run_starts(path, missing_ok=False):
        with pytest.raises(ValueError, match="another run is writing to"):
            Journal(tmp_path / "journal")
        seen.append(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", another_run_starts)
    Journal(tmp_path / "journal").close()
    assert seen == [tmp_path / "journal"]


def test_a_journal_removed_between_opening_and_locking_is_opened_anew(tmp_path, monkeypatch):
    lock, calls = subject._lock, []

    def the_other_run_ends_first(file, path):
        calls.append(path)
        if len(calls) == 1:
            os.unlink(path)
        return lock(file, path)

    monkeypatch.setattr(subject, "_lock", the_other_run_ends_first)
    with Journal(tmp_path / "journal") as journal:
        journal.start({})
        journal.append([row("a", 1)])
        assert [each["file_name"] for each in journal.rows(["a"])] == ["a"]
    assert len(calls) == 2
