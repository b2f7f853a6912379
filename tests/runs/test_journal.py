"""Cut anywhere, a journal holds whole batches and nothing else."""

import pytest

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
