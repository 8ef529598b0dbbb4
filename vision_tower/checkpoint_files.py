"""Files of weights made by other people: named tensors out of `.safetensors`, or what `torch.save` writes, opened
without running code and without trusting a size that the file states.

Limits, above which a file is refused: `MAX_TENSORS` tensors, `MAX_HEADER` bytes of names and shapes, `MAX_OPERATIONS`
steps of its pickle, and tensors that together are larger than `MAX_ENLARGED` times the file (tied weights are stored
once). Compressed archives and files from before torch 1.6 are refused too.
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
MAX_OPERATIONS = 250_000  # a tensor takes about 30
MAX_ENLARGED = 2
_MAX_OPEN = 20_000  # values on the stack of a pickle, which stores a dict a thousand entries at a time

# Names that a pickle of tensors refers to. `torch.load` allows more: a bytearray of any size, for one.
_IN_A_PICKLE = re.compile(
    r"collections OrderedDict|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|qtensor|sparse_tensor"
    r"|meta_tensor_no_storage)|torch\.serialization _get_layout"
    r"|torch (Size|device|\w+Storage|[a-z]+\d+\w*|bool|per_\w+_affine)|torch\.storage (Typed|Untyped)Storage"
)
_OTHER_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
# What the libraries raise on damaged files, found by damaging some 50,000 of them (tests/faults/test_fuzz.py does so
# with fewer). Only their calls are inside a `try`: a TypeError of our own is a bug.
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
_WHOLE = "was it copied whole?"
_RUNS_CODE = (
    "is not a plain file of weights: opening it would run code, or it is damaged; save the state_dict() with "
    "torch.save, or as safetensors"
)


def read_tensors(path: str | os.PathLike, entry: str | None = None) -> StateDict:
    """The tensors of a file by name: dense, on the CPU, each within what the file holds.

    Args:
        path: `.safetensors`, or any other ending for what `torch.save` wrote.
        entry: The name under which the tensors lie in the file; None if they are all that it holds.

    Raises:
        ValueError: If the file is missing, damaged, would run code, exceeds a limit, or holds anything but named dense
            tensors there. The file, and the tensor if it is one, are named.
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
            # mapped: a storage is then a slice of the file, which cannot reach over its end
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    tensors = content.get(entry) if entry is not None and isinstance(content, Mapping) else content
    named = "named tensors" if entry is None else f"named tensors under {entry!r}"
    if not isinstance(tensors, Mapping):
        raise ValueError(f"expected {named} in {path}, got {type(tensors).__name__}; save a state_dict() alone")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"expected {named} in {path}, got {shown(name)}: {type(tensor).__name__}; save a state_dict() alone"
            )
    _check_sizes(path, tensors)
    return dict(tensors)


def shown(name: object) -> str:
    """A name out of a file in one short line."""
    text = name if isinstance(name, str) and name.isprintable() else repr(name)
    return text if len(text) <= 120 else text[:117] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an error, for messages of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _reading(path: Path, damage: tuple[type[Exception], ...]) -> Iterator[None]:
    """Around a call of a library: what it raises on damaged files becomes a ValueError that names the file."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} {_RUNS_CODE}") from error
    except damage as error:
        raise ValueError(f"{path} is damaged or not a file of weights: {first_line(error)}; {_WHOLE}") from error


def _check_header(path: Path) -> None:
    """Refuse a .safetensors file whose header is cut short, or longer than names and shapes can be."""
    with open(path, "rb") as file:
        head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > path.stat().st_size:
        raise ValueError(f"{path} is damaged or not a file of weights: it is cut short; {_WHOLE}")
    if length > MAX_HEADER:
        raise ValueError(f"{path} has a header of {length:,} bytes; expected at most {MAX_HEADER:,}")


def _pickle_of(path: Path) -> bytes:
    """The pickle inside an archive of `torch.save`, once every checksum in it was found right."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError(
                f"{path} is damaged or not a file of weights: expected the archive that torch.save writes; {_WHOLE} A "
                "file from before torch 1.6 is loaded and saved again with a newer torch"
            )
    with _reading(path, _ZIP_DAMAGE):
        archive = zipfile.ZipFile(path)
    with archive:
        members = archive.infolist()
        _check_members(path, members)
        with _reading(path, _ZIP_DAMAGE):
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{path} is damaged: the checksum of {shown(damaged)} is wrong; {_WHOLE}")
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_HEADER:
            raise ValueError(
                f"{path} is not a file of torch.save: expected one data.pkl of at most {MAX_HEADER:,} bytes"
            )
        return archive.read(pickles[0])


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuse an archive that `torch.save` does not write."""
    if len(members) > 2 * MAX_TENSORS:
        raise ValueError(f"{path} has {len(members):,} members; expected at most {MAX_TENSORS:,} tensors")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path} is compressed ({shown(member.filename)}); torch.save writes plain archives")
        if member.filename.endswith("/constants.pkl"):
            raise ValueError(
                f"{path} is a TorchScript archive; load it with torch.jit.load, then torch.save its state_dict()"
            )
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError(f"{path} is damaged: its members are larger than the file; {_WHOLE}")


def _check_pickle(path: Path, pickled: bytes) -> None:
    """Refuse a pickle that refers to anything but tensors and containers, or that unfolds without end."""
    with _reading(path, _PICKLE_DAMAGE):
        steps = list(itertools.islice(pickletools.genops(pickled), MAX_OPERATIONS + 1))
    sizes: list[int | None] = []  # of what lies on the pickle machine's stack, None for a mark
    memo: dict[int, int] = {}
    tensors = 0
    for operation, argument, _ in steps:
        called = operation.name == "GLOBAL" and not _IN_A_PICKLE.fullmatch(argument)
        if called or operation.name in _OTHER_CALLS:
            raise ValueError(f"{path} {_RUNS_CODE} ({shown(argument)})")
        try:
            size = _apply(operation, argument, sizes, memo)
        except (LookupError, StopIteration):
            raise ValueError(f"{path} is damaged: its pickle ends in the middle of something; {_WHOLE}") from None
        tensors += operation.name == "BINPERSID"
        if max(len(steps), size) > MAX_OPERATIONS or len(sizes) > _MAX_OPEN or tensors > MAX_TENSORS:
            raise ValueError(
                f"{path} is too long: expected at most {MAX_TENSORS:,} tensors, in a pickle of {MAX_OPERATIONS:,} steps"
            )


def _apply(operation: pickletools.OpcodeInfo, argument: Any, sizes: list[int | None], memo: dict[int, int]) -> int:
    """Do with sizes what a step of a pickle does with values; the size of what it makes.

    What is referred to counts each time: sixty tuples, each of two references to the one before, take years to hash.
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
    """Refuse tensors that are not dense, or that are larger than what the file holds of them."""
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{path} holds {len(tensors):,} tensors; expected at most {MAX_TENSORS:,}")
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
                f"{path}: {shown(name)} of shape {shown(tuple(tensor.shape))} is larger than what is stored of it; "
                "save it with .contiguous()"
            )
    if total > MAX_ENLARGED * path.stat().st_size:
        raise ValueError(f"{path} unfolds to {total:,} bytes of tensors, more than {MAX_ENLARGED} times its own size")
