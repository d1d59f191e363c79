"""Files beside a model: whole or not there, and told where they are broken."""

import json

import pytest

from sigphi.hub_card.errors import UserError
from sigphi.hub_card.files import read_json, read_record, write_whole, written_aside
from sigphi.train import errors


def test_a_file_without_room_leaves_the_one_that_was_there(tmp_path, small_files):
    path = tmp_path / "eval_results.json"
    write_whole(path, "before")
    with pytest.raises(OSError, match="large"):
        write_whole(path, "x" * 30_000)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_has_its_name_when_it_is_written(tmp_path):
    path = tmp_path / "curve.png"
    with written_aside(path) as aside:
        aside.write_text("half")
        assert not path.exists() and aside.parent == tmp_path and aside.suffix == ".png"
        aside.write_text("whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b'{"a": \xff}', b"[" * 100_000])
def test_what_is_no_json_is_named_with_the_remedy(content, tmp_path):
    path = tmp_path / "training_data.json"
    path.write_bytes(content)
    for read in (read_json, read_record):
        with pytest.raises(UserError, match=f"{path} is not the JSON that it should be; .* or remove it") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_a_record_is_an_object_and_may_be_missing(tmp_path):
    path = tmp_path / "eval_results.json"
    assert read_record(path) == {}
    path.write_text(json.dumps([1]))
    assert read_json(path) == [1]
    with pytest.raises(UserError, match="eval_results.json is not the JSON that it should be"):
        read_record(path)


def test_there_is_one_error_that_a_user_can_mend():
    assert errors.UserError is UserError
