"""Reads pickles of plain lists, dicts, strings and numbers, such as RefCOCO's refs(...).p, without running code.

Python's C unpickler allocates whatever size a pickle states (8.8 GB for a file of 13 bytes), so this uses the Python
implementation, whose memory use is proportional to the file, restricted to the opcodes of plain content. Reading 50,000
refs takes seconds.
"""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

from mllm.data.json_files import open_file

MAX_PICKLE_BYTES = 256 * 2**20  # RefCOCO's largest file has about 40 MB

# What the unpickler raises on damaged files
_UNPICKLING_ERRORS = (
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
# The last line: opcodes that refer to code or external objects, included only for a clear error.
_OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    GLOBAL STACK_GLOBAL INST OBJ NEWOBJ NEWOBJ_EX REDUCE BUILD EXT1 EXT2 EXT4 PERSID BINPERSID
""".split()
_KEYS = (str, int, float, bool, bytes, type(None))


class _PlainUnpickler(pickle._Unpickler):  # the Python implementation
    """Builds only lists, tuples, dicts, strings and numbers."""

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in (getattr(pickle, name) for name in _OPCODES)}

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which would run code")

    def get_extension(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"it refers to the registered class {code}, which would run code")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")

    # Hashing a deeply nested tuple can crash the interpreter or never end, so keys must be of plain types.

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
            raise pickle.UnpicklingError("it sets items of an object that is not a dict")
        for at in range(0, len(items), 2):
            if type(items[at]) not in _KEYS:
                raise pickle.UnpicklingError(f"a dict has a {type(items[at]).__name__} as its key")
            target[items[at]] = items[at + 1]

    overrides: dict[int, Any] = {pickle.DICT[0]: load_dict, pickle.SETITEM[0]: load_setitem}
    dispatch |= overrides | {pickle.SETITEMS[0]: load_setitems}


def read_pickle(path: Path) -> Any:
    """The content of a pickle of plain containers, strings and numbers, written by Python 2 or 3.

    Raises:
        ValueError: If the file is missing, damaged, larger than `MAX_PICKLE_BYTES`, or contains other objects.
    """
    with open_file(path, MAX_PICKLE_BYTES) as file:
        try:
            content = file.read()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error}") from error
    try:
        # latin1, as refer.py of lichengunc/refer reads these files in Python 2
        return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except _UNPICKLING_ERRORS as error:
        reason = f"unexpected opcode {error}" if isinstance(error, KeyError) else str(error) or "truncated"
        raise ValueError(f"{path} is damaged or not a pickle of lists, dicts, strings and numbers: {reason}") from error
