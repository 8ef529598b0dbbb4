"""Reads pickles of plain lists, dicts, strings and numbers: RefCOCO's refs(...).p. Nothing in them is run.

The interpreter's own pickle in C allocates as much as a pickle asks for (13 bytes: 8.8 GB), so this uses the one in
Python, whose memory stays in proportion to the file, with the opcodes that plain content needs. 50,000 refs take
seconds: a file is read once.
"""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

from mllm.data.json_files import open_file

LARGEST_PICKLE = 256 * 2**20  # bytes; RefCOCO's largest has about 40 MB

# What the unpickler raises on damaged files
_DAMAGE = (
    pickle.UnpicklingError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    struct.error,
)
# Those that name functions, classes or objects outside the file are there only to be refused with a reason.
_PLAIN = """
    PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    GLOBAL STACK_GLOBAL INST OBJ NEWOBJ NEWOBJ_EX REDUCE BUILD EXT1 EXT2 EXT4 PERSID BINPERSID
""".split()
_KEYS = (str, int, float, bool, bytes, type(None))


class _PlainUnpickler(pickle._Unpickler):  # the one in Python
    """Builds lists, tuples, dicts, strings and numbers, nothing else."""

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in (getattr(pickle, name) for name in _PLAIN)}

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which would be run")

    def get_extension(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"it names the registered class {code}, which would be run")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")

    # Hashing a deeply nested tuple can crash the interpreter, or take forever: keys are plain.

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list) -> None:
        if len(items) % 2 or not isinstance(target := self.stack[-1], dict):
            raise pickle.UnpicklingError("it sets items of something other than a dict")
        for at in range(0, len(items), 2):
            if type(items[at]) not in _KEYS:
                raise pickle.UnpicklingError(f"a dict has a {type(items[at]).__name__} as its key")
            target[items[at]] = items[at + 1]

    ours: dict[int, Any] = {pickle.DICT[0]: load_dict, pickle.SETITEM[0]: load_setitem}
    dispatch |= ours | {pickle.SETITEMS[0]: load_setitems}


def read_pickle(path: Path) -> Any:
    """The content of a pickle of plain containers, strings and numbers, as Python 2 or 3 wrote it.

    Raises:
        ValueError: If it is missing, larger than `LARGEST_PICKLE` or damaged, or holds anything else.
    """
    with open_file(path, LARGEST_PICKLE) as file:
        try:
            content = file.read()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error}") from error
    try:
        # as its own reader does: refer.py of lichengunc/refer opens it in Python 2, whose bytes these are
        return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except _DAMAGE as error:
        reason = f"unexpected opcode {error}" if isinstance(error, KeyError) else str(error) or "cut short"
        raise ValueError(
            f"{path} is damaged, or is not a pickle of plain lists, dicts, strings and numbers: {reason}"
        ) from error
