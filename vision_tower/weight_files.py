"""Reading of untrusted checkpoints: `.safetensors` files and archives of `torch.save`.

No code is run, and sizes stated in the file are not trusted. It is an error if a file exceeds a limit: `MAX_TENSORS`
tensors, `MAX_HEADER` bytes of names and shapes, `MAX_OPCODES` opcodes in the pickle, and a total size of the tensors of
`MAX_EXPANSION` times the file size (tied weights are stored once). Compressed archives and files from before torch 1.6
are not supported.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

StateDict = dict[str, torch.Tensor]

MAX_TENSORS = 5_000
MAX_HEADER = 4_000_000  # bytes
MAX_OPCODES = 250_000  # about 30 per tensor
MAX_EXPANSION = 2
_MAX_STACK = 20_000  # values on the stack of a pickle, which stores dicts in batches of 1,000 entries

# Globals that a pickle of tensors refers to. `torch.load` allows more, such as a bytearray of any size.
_ALLOWED_GLOBALS = re.compile(
    r"collections OrderedDict|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|qtensor|sparse_tensor"
    r"|meta_tensor_no_storage)|torch\.serialization _get_layout"
    r"|torch (Size|device|\w+Storage|[a-z]+\d+\w*|bool|per_\w+_affine)|torch\.storage (Typed|Untyped)Storage"
)
_CALL_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
# Exceptions that the libraries raise for damaged files, found by damaging about 50,000 files (tests/faults/test_fuzz.py
# damages fewer). Only calls of the libraries are in a `try`, so that a TypeError in our code is not hidden.
_ZIP_DAMAGE = (zipfile.BadZipFile, struct.error, OSError, EOFError, ValueError, RuntimeError)
_PICKLE_DAMAGE = (
    pickle.UnpicklingError,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    RuntimeError,
)
_SAFETENSORS_DAMAGE = (SafetensorError, OSError, KeyError, TypeError, RuntimeError)
_IS_COMPLETE = "is the copy complete?"
_RUNS_CODE = (
    "is damaged, or contains more than tensors and loading it would run code; save the state_dict() with torch.save "
    "or as safetensors"
)


def read_tensors(path: str | os.PathLike, entry: str | None = None) -> StateDict:
    """Read dense tensors by name, to the CPU.

    Args:
        path: A `.safetensors` file, or a file of `torch.save` with any other suffix.
        entry: Key of the state dict in the file; None if the file contains only the state dict.

    Raises:
        ValueError: If the file is not found, is damaged, would run code, exceeds a limit, or contains anything but
            named dense tensors. The message contains the file and the tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint not found: {path} (expected a .pth or .safetensors file)")
    if path.suffix == ".safetensors":
        _check_header(path)
        with _reading(path, _SAFETENSORS_DAMAGE):
            content = load_file(path)
    else:
        _check_pickle(path, _pickle_of(path))
        with _reading(path, _PICKLE_DAMAGE):
            # memory-mapped: storages are slices of the file and cannot extend beyond its end
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    tensors = content.get(entry) if entry is not None and isinstance(content, Mapping) else content
    named = "named tensors" if entry is None else f"named tensors under {entry!r}"
    if not isinstance(tensors, Mapping):
        raise ValueError(f"expected {named} in {path}, got {type(tensors).__name__}; save only a state_dict()")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"expected {named} in {path}, got {shown(name)}: {type(tensor).__name__}; save only a state_dict()"
            )
    _check_sizes(path, tensors)
    return dict(tensors)


def shown(name: object) -> str:
    """A name from a file, on one line of at most 120 characters."""
    text = name if isinstance(name, str) and name.isprintable() else repr(name)
    return text if len(text) <= 120 else text[:117] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an error, for one-line messages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _reading(path: Path, damage: tuple[type[Exception], ...]) -> Iterator[None]:
    """Convert the exceptions of a library for damaged files to a ValueError with the path."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} {_RUNS_CODE}") from error
    except damage as error:
        raise ValueError(f"{path} is damaged or not a checkpoint: {first_line(error)}; {_IS_COMPLETE}") from error


def _check_header(path: Path) -> None:
    """Raise ValueError if the header of a .safetensors file is truncated or too long."""
    with open(path, "rb") as file:
        head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > path.stat().st_size:
        raise ValueError(f"{path} is damaged or not a checkpoint: it is truncated; {_IS_COMPLETE}")
    if length > MAX_HEADER:
        raise ValueError(f"{path} has a header of {length:,} bytes; expected at most {MAX_HEADER:,}")


def _pickle_of(path: Path) -> bytes:
    """Read the pickle in an archive of `torch.save`, after verifying all checksums."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError(
                f"{path} is damaged or not a checkpoint: expected an archive written by torch.save; {_IS_COMPLETE} "
                "Load a file from before torch 1.6 with a newer torch and save it again"
            )
    with _reading(path, _ZIP_DAMAGE):
        archive = zipfile.ZipFile(path)
    with archive:
        members = archive.infolist()
        _check_members(path, members)
        with _reading(path, _ZIP_DAMAGE):
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{path} is damaged: the checksum of {shown(damaged)} is wrong; {_IS_COMPLETE}")
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_HEADER:
            raise ValueError(
                f"{path} was not written by torch.save: expected one data.pkl of at most {MAX_HEADER:,} bytes"
            )
        return archive.read(pickles[0])


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Raise ValueError if `torch.save` would not write such an archive."""
    if len(members) > 2 * MAX_TENSORS:
        raise ValueError(f"{path} has {len(members):,} members; expected at most {MAX_TENSORS:,} tensors")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path} is compressed ({shown(member.filename)}); expected an uncompressed archive")
        if member.filename.endswith("/constants.pkl"):
            raise ValueError(
                f"{path} is a TorchScript archive; load it with torch.jit.load, then torch.save its state_dict()"
            )
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError(f"{path} is damaged: its members are larger than the file; {_IS_COMPLETE}")


def _check_pickle(path: Path, pickled: bytes) -> None:
    """Raise ValueError if a pickle refers to anything but tensors and containers, or expands beyond the limits."""
    with _reading(path, _PICKLE_DAMAGE):
        opcodes = list(itertools.islice(pickletools.genops(pickled), MAX_OPCODES + 1))
    sizes: list[int | None] = []  # of the values on the stack of the pickle machine; None is a mark
    memo: dict[int, int] = {}
    tensors = 0
    for operation, argument, _ in opcodes:
        called = operation.name == "GLOBAL" and not _ALLOWED_GLOBALS.fullmatch(argument)
        if called or operation.name in _CALL_OPCODES:
            raise ValueError(f"{path} {_RUNS_CODE} ({shown(argument)})")
        try:
            size = _apply(operation, argument, sizes, memo)
        except (LookupError, StopIteration):
            raise ValueError(f"{path} is damaged: its pickle is truncated; {_IS_COMPLETE}") from None
        tensors += operation.name == "BINPERSID"
        if max(len(opcodes), size) > MAX_OPCODES or len(sizes) > _MAX_STACK or tensors > MAX_TENSORS:
            raise ValueError(
                f"{path} is too large: expected at most {MAX_TENSORS:,} tensors and {MAX_OPCODES:,} pickle opcodes"
            )


def _apply(operation: pickletools.OpcodeInfo, argument: Any, sizes: list[int | None], memo: dict[int, int]) -> int:
    """Apply a pickle opcode to a stack of sizes instead of values; returns the size of the new value.

    A value counts each time it is referenced: 60 tuples, each with two references to the previous one, would take years
    to hash.
    """
    if "PUT" in operation.name:
        memo[argument] = sizes[-1] or 0
        return 0
    if "GET" in operation.name:
        sizes.append(memo[argument])
        return memo[argument]
    taken = len(operation.stack_before)
    if pickletools.markobject in operation.stack_before:
        above = next(above for above, size in enumerate(reversed(sizes)) if size is None)
        taken = operation.stack_before.index(pickletools.markobject) + above + 1
    if taken > len(sizes):
        raise IndexError
    size = 1
    for _ in range(taken):
        size += sizes.pop() or 0
    sizes += [None if kind is pickletools.markobject else size for kind in operation.stack_after]
    return size


def _check_sizes(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError if a tensor is not dense, or is larger than its data in the file."""
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{path} contains {len(tensors):,} tensors; expected at most {MAX_TENSORS:,}")
    total = 0
    for name, tensor in tensors.items():
        kind = (
            "quantized" if tensor.is_quantized else tensor.layout if tensor.layout != torch.strided else tensor.device
        )
        if str(kind) != "cpu":
            raise ValueError(f"{path}: expected a dense tensor {shown(name)}, got a {kind} one")
        size = tensor.numel() * tensor.element_size()
        total += size
        if size > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: {shown(name)} of shape {shown(tuple(tensor.shape))} is larger than its stored data; "
                "save it with .contiguous()"
            )
    if total > MAX_EXPANSION * path.stat().st_size:
        raise ValueError(f"{path} expands to {total:,} bytes of tensors, more than {MAX_EXPANSION} times its size")
