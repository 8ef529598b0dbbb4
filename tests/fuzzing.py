"""Strategies of the fuzz tests: malformed records, damaged bytes, and limits on time and memory.

A case is the content of one file, derived from a valid file by replacing fields of its records or by damaging bytes.
"""

import contextlib
import copy
import json
import pickle
import resource
import signal
import sys
import time

from hypothesis import strategies as st

SECONDS = 2
BYTES = 1_000_000_000

_NUMBERS = [0, -1, 1, 1.5, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324]
_NUMBERS += [2**31, 2**63, -(2**64), 10**30, 10**400]
_STRINGS = ["", " ", "0", "x", "1e400", "\ud800", "\0", "\x1b[2J", "../" * 9, "x" * 5000]
_LISTS = [[], [None], [[]], [0], [0, 0, 0, 0], [1, 2, float("nan"), 4], ["a", "b"], [{}]]
_OBJECTS = [{}, {"": None}, {"id": 1}, {"size": [2, 2], "counts": "x"}]
HOSTILE = [None, True, False, *_NUMBERS, *_STRINGS, *_LISTS, *_OBJECTS]
_TEXTS = [
    b"",
    b" ",
    b"null",
    b"0",
    b'""',
    b"[]",
    b"{}",
    b"[[]]",
    b"[{}]",
    b"[" * 5000,
    b'{"a":' * 5000,
    b"\xef\xbb\xbf",
]
_TEXTS += [b"\xff\xfe[\0]\0", b"\0" * 512, b"1e999", b"9" * 5000, b'"\\ud800"', b"{}\n{}", b"[1,2", b"NaN", b"\r\n"]


def paths_in(value, path=()):
    """The path of each value inside a record."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


@st.composite
def hostile_records(draw, valid):
    """A record with one to three values replaced, dropped, repeated, nested or renamed."""
    holder = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(1, 3))):
        places = [path for path in paths_in(holder) if path]
        *outer, last = places[draw(st.integers(0, len(places) - 1))]
        parent = holder
        for key in outer:
            parent = parent[key]
        change, value = draw(st.integers(0, 5)), copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        if change == 1 and len(outer) > 0:
            del parent[last]
        elif change == 2 and isinstance(parent, list):
            parent.insert(last, copy.deepcopy(parent[last]))
        elif change == 3 and isinstance(parent, dict):
            parent["new"] = value
        elif change == 4:
            parent[last] = [parent[last]]
        elif change == 5 and isinstance(parent[last], int | float) and not isinstance(parent[last], bool):
            parent[last] = parent[last] * draw(st.sampled_from([-1, 0, 0.5, 1000, 10**9, 10**20]))
        else:
            parent[last] = value
    return holder[0]


@st.composite
def damaged(draw, content):
    """Bytes truncated, flipped, inserted, dropped or repeated at one to four positions."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        change, place = draw(st.integers(0, 6)), draw(st.integers(0, len(content) - 1))
        if change == 0:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif change == 1:
            content[place] = draw(st.integers(0, 255))
        elif change == 2:
            del content[place:]
        elif change == 3:
            content[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif change == 4:
            del content[place : place + draw(st.integers(1, 8))]
        elif change == 5:
            other = draw(st.integers(0, len(content) - 1))
            content[place:place] = content[other : other + draw(st.integers(1, 64))]
        else:
            content[place : place + 4] = draw(
                st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
            )
    return bytes(content)


def json_cases(valid, lines=False):
    """JSON files, or files with one JSON value per line."""

    def dumped(value):
        if lines and isinstance(value, list):
            return b"".join(json.dumps(line).encode() + b"\n" for line in value)
        return json.dumps(value).encode()

    records = hostile_records(valid).map(dumped)
    return st.one_of(records, records, records, damaged(dumped(valid)), st.sampled_from(_TEXTS))


def pickle_cases(valid):
    """Pickle files."""
    records = hostile_records(valid).map(lambda value: pickle.dumps(value, 2))
    return st.one_of(records, records, damaged(pickle.dumps(valid, 2)), st.sampled_from(_TEXTS))


def byte_cases(*contents):
    """Damaged binary files."""
    return st.one_of(*map(damaged, contents), st.sampled_from(_TEXTS))


@contextlib.contextmanager
def limited():
    """Raise an error after 2 seconds of CPU time or 1 GB of additional memory."""

    def too_long(*_):
        raise TimeoutError(f"a case took more than {SECONDS} seconds")

    linux = sys.platform == "linux"
    before = resource.getrlimit(resource.RLIMIT_AS)
    # CPU time, because other processes may use the cores; the wall clock catches endless waits
    timers = [(signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, 20 * SECONDS)]
    earlier = [signal.signal(name, too_long) for _, name, _ in timers]
    start = time.process_time()
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    if linux:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    try:
        yield
    finally:
        for (timer, name, _), handler in zip(timers, earlier, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(name, handler)
        if linux:
            resource.setrlimit(resource.RLIMIT_AS, before)
    if time.process_time() - start > SECONDS:  # code that signals do not interrupt
        raise TimeoutError(f"a case took more than {SECONDS} seconds")
