"""JSON of others: streamed as the json module reads it, within limits of size and nesting."""

import json
import os
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mllm.data import json_files
from mllm.data.json_files import check_kept, json_lines, parse_record, read_json, stream_json
from tests.files import write_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(values, max_size=8), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
def test_a_streamed_list_is_what_json_reads(tmp_path, content, size, indent, ascii_only):
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    expected = json.loads(text)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "_READ_AT_ONCE", size)
        assert list(stream_json(tmp_path / "x.json")) == expected


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet='[]{},:"0123456789.eE+-truefalsn \\u\ud800\x00', max_size=30), st.integers(1, 5))
def test_text_that_is_not_a_list_is_refused_as_json_refuses_it(tmp_path, text, size):
    (tmp_path / "x.json").write_bytes(("[" + text).encode("utf-8", "surrogatepass"))
    try:
        expected = json.loads(("[" + text).encode("utf-8", "surrogatepass").decode())
    except ValueError:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "_READ_AT_ONCE", size)
        if isinstance(expected, list):
            assert repr(list(stream_json(tmp_path / "x.json"))) == repr(expected)
        else:
            with pytest.raises(ValueError, match="x.json"):
                list(stream_json(tmp_path / "x.json"))


@pytest.mark.parametrize("content", ["[" * 1_000_000, "[" + '{"a":' * 1_000_000, "[[1], " + "[" * 1_000_000])
@pytest.mark.parametrize("read", [lambda path: list(stream_json(path)), lambda path: read_json(path, list)])
def test_deep_nesting_costs_no_memory(tmp_path, read, content):
    (tmp_path / "x.json").write_text(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="x.json.*nested too deeply"):
        read(tmp_path / "x.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_an_entry_and_a_file_have_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "_READ_AT_ONCE", 10)
    monkeypatch.setattr(json_files, "LARGEST_RECORD", 100)
    file = tmp_path / "x.json"
    write_json(file, ["a" * 90, "b" * 90])
    assert len(list(stream_json(file))) == 2
    write_json(file, [1, "b" * 200, 2])
    entries = stream_json(file)
    assert next(entries) == 1
    with pytest.raises(ValueError, match="x.json: the entry at character 4 has over 100 characters"):
        next(entries)
    with open(file, "wb") as sparse:
        sparse.truncate(json_files.LARGEST_FILE + 1)
    with pytest.raises(ValueError, match="x.json has 2,147,483,649 bytes; at most 2,147,483,648 can be read"):
        read_json(file, list)


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "x.json")  # reading it would wait forever
    for read in (
        lambda path: read_json(path, list),
        lambda path: list(stream_json(path)),
        lambda p: list(json_lines(p)),
    ):
        with pytest.raises(ValueError, match="x.json: it is not a file"):
            read(tmp_path / "x.json")


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"9" * 5000, "Exceeds the limit"),
        (b"[NaN]", "NaN or infinite"),
        (b"[1e400]", "NaN or infinite"),
        (b'["\\ud800"]', "not UTF-8"),
        (b'{"\\ud800": 1}', "not UTF-8"),
        (b"[" * 101 + b"]" * 101, "nested more than 100 levels deep"),
        (b"[" * 9999, "nested more than 100 levels deep"),
    ],
)
def test_a_record_that_is_kept_can_be_written_again(content, problem):
    with pytest.raises(ValueError, match=problem):
        parse_record(content)


def test_the_deepest_record_that_is_kept():
    assert parse_record(b"\xef\xbb\xbf" + b"[" * 100 + b"]" * 100)
    for plain in (None, 5, "x", [], {}, {"a": [{"b": 1}]}):
        check_kept(plain)
