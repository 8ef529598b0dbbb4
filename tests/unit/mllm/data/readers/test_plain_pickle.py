"""Pickles of plain content: nothing is run, and no few bytes ask for much memory or time."""

import pickle
import resource
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mllm.data.read_report import ReadReport
from mllm.data.readers import plain_pickle
from mllm.data.readers.plain_pickle import read_pickle


class Evil:
    def __reduce__(self):
        import os

        return os.mkdir, ("/tmp/this-must-never-be-made",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "content", [Evil(), [Evil()], {"a": np.float64(1)}, ReadReport()], ids=["call", "inside", "numpy", "class"]
)
def test_a_pickle_that_builds_anything_else_is_refused(tmp_path, protocol, content):
    file = tmp_path / "refs(umd).p"
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ValueError, match="would run code"):
        read_pickle(file)


@pytest.mark.parametrize("protocol", range(3))
def test_plain_content_comes_back(tmp_path, protocol):
    content = [{"text": "caf\u00e9", "number": 10**20, "list": [1.5, None, True, ("a", 2)]}]
    (tmp_path / "p").write_bytes(pickle.dumps(content, protocol=protocol))
    assert read_pickle(tmp_path / "p") == content


def test_python_2_strings(tmp_path):
    """What Python 2's cPickle writes for [{'sent': 'caf\\xe9', 'raw': u'caf\\xe9'}], protocol 0 and 2."""
    for content in (
        b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsS'raw'\np4\nVcaf\xe9\np5\nsa.",
        b"\x80\x02]q\x00}q\x01(U\x04sentU\x04caf\xe9U\x03rawX\x05\x00\x00\x00caf\xc3\xa9ua.",
    ):
        (tmp_path / "p").write_bytes(content)
        assert read_pickle(tmp_path / "p") == [{"sent": "caf\u00e9", "raw": "caf\u00e9"}]


def test_a_cut_pickle_is_named(tmp_path):
    file = tmp_path / "refs(umd).p"
    file.write_bytes(pickle.dumps([{"ref_id": number, "sent": "x" * 9} for number in range(20)], protocol=0))
    for length in (0, 10, 300, file.stat().st_size - 1):
        (tmp_path / "cut").write_bytes(file.read_bytes()[:length])
        with pytest.raises(ValueError, match="damaged"):
            read_pickle(tmp_path / "cut")


def size(number):
    return number.to_bytes(8, "little")


DEEP = b"N" + b"\x85" * 50_000  # tuples in tuples
DOUBLED = b"N" + b"\x94h\x00\x86" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(1, 60))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\xff\xff\xff\x1f.",  # a memo of 2^29 entries
        b"]p536870911\n.",
        b"\x80\x05\x96" + size(2**40) + b".",  # BYTEARRAY8
        b"\x8d" + size(2**62) + b".",  # BINUNICODE8
        b"\x8e" + size(2**40) + b".",  # BINBYTES8
        b"\x95" + size(2**60) + b".",  # FRAME
        b"\x8b\xff\xff\xff\x7f.",  # LONG4
        b"\x8b\xff\xff\xff\xff.",
        b"I" + b"9" * 10_000 + b"\n.",
        DEEP + b".",
        b"}" + DEEP + b"Ns.",  # as a key: hashing it crashes the interpreter
        b"(" + DEEP + b"Nd.",
        b"}(" + DEEP + b"Nu.",
        b"\x8f(" + DEEP + b"\x90.",  # a set
        b"(" + DEEP + b"\x91.",
        b"}" + DOUBLED + b"Ns.",  # 2^60 values, written out
        b"]\x94h\x00a.",  # a list in itself
        b"}\x94N]s.",
        b"]K\x00K\x01s.",
        b"\x97.",  # NEXT_BUFFER
        b"\x82\x01.",
        b"K\x01R.",
        b"]}b.",
        b"]Nb.",
        b"K\x01a.",
        b"0.",
        b"\xfe.",
        b"",
    ],
)
def test_few_bytes_cost_little(tmp_path, content):
    (tmp_path / "p").write_bytes(content)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read_pickle(tmp_path / "p")
    except ValueError as error:
        assert str(tmp_path / "p") in str(error) and "\n" not in str(error)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB


def test_the_size_is_limited(tmp_path):
    with open(tmp_path / "p", "wb") as file:
        file.truncate(plain_pickle.MAX_PICKLE_BYTES + 1)
    with pytest.raises(ValueError, match="the limit is 268,435,456"):
        read_pickle(tmp_path / "p")


OPCODES = [bytes([value]) for value in sorted({getattr(pickle, name)[0] for name in plain_pickle._OPCODES})]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(OPCODES) | st.binary(max_size=4), max_size=40))
def test_any_opcodes_end_in_a_result_or_a_value_error(tmp_path, codes):
    (tmp_path / "p").write_bytes(b"".join(codes) + b".")
    try:
        read_pickle(tmp_path / "p")
    except ValueError:
        pass
