"""Files are written atomically."""

from spectrafm_hf.files import complete_file


def test_two_writers_of_one_file_do_not_meet_though_their_process_numbers_are_the_same(tmp_path):
    path = tmp_path / "text"
    with complete_file(path) as one:
        one.write_text("one")
        with complete_file(path) as other:
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["text"]
