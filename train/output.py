"""The output folder of a run: whose it is, where the run resumes, whether it is finished, and what it holds then."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from alpha_clip_commands.command_line import one_line
from mllm.files import cannot_write, sync_files, write_json
from mllm.folders import claim_folder
from mllm.loading import EMBEDDED_MODEL
from mllm.locks import locked
from train.skipped import SKIPPED, SkippedItem

WHOLE = "whole.json"  # written last into a checkpoint: without it one is incomplete
TRAINING_RECORD = "training_record.json"  # written last beside a finished model: what made it, and its curves
_TIMES = re.compile(r"_(runtime|time|per_second)$")
_SAVED = (".safetensors", ".json", ".jinja", ".model")  # what a model and its processor are loaded from


class Resumption(NamedTuple):
    """Where a run begins: at a checkpoint, from nothing (None), or not at all, as it is finished."""

    checkpoint: Path | None
    finished: bool


@contextlib.contextmanager
def held_output(args: TrainingArguments, run: Mapping[str, Any]) -> Iterator[Resumption]:
    """Hold the output folder of a run, which the main process (of all machines) locks, and say where the run resumes.

    Raises:
        ValueError: If the folder was not written by this command, is of another run, is read by this one, or is used by
            another process.
        ConnectionError: If the main process was refused; it says why.
        OSError: If the folder cannot be written.
    """
    with contextlib.ExitStack() as held:
        resumption = None
        try:
            if args.process_index == 0:
                out = claim_folder(args.output_dir, "training", reads=what_it_reads(run), known=_is_a_run)
                held.enter_context(locked(out, inside=True))
                resumption = _resumption(out, run)
                if resumption == (None, False):  # from the start: what an earlier attempt left out may be fixed
                    (out / SKIPPED).unlink(missing_ok=True)
        finally:
            resumption = from_main_process(args, resumption)
        if resumption is None:
            raise ConnectionError("another process of the run failed; its error is above")
        yield resumption


def from_main_process(args: TrainingArguments, value: Any) -> Any:
    """What the main process has, on every process."""
    if args.world_size == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def what_it_reads(run: Mapping[str, Any]) -> list[str]:
    """Model, weights and data of a run."""
    sources = [run.get("model") or EMBEDDED_MODEL, run.get("alpha_weights"), *run.get("data", ())]
    return [str(source) for source in sources if source is not None]


def _is_a_run(folder: Path) -> bool:
    """Whether an earlier version trained into a folder without a marker."""
    return (folder / TRAINING_RECORD).exists() or last_whole_checkpoint(folder) is not None


def _resumption(out: Path, run: Mapping[str, Any]) -> Resumption:
    """Where a run in a folder begins.

    Raises:
        ValueError: If the folder is of another run: other model, data or settings.
    """
    checkpoint, record = last_whole_checkpoint(out), out / TRAINING_RECORD
    if checkpoint is not None:
        refuse_other_run(checkpoint, checkpoint / WHOLE, run)
    if record.exists():
        refuse_other_run(record, record, run)
    return Resumption(checkpoint, _is_whole(out))


def last_whole_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint of a run's folder. Incomplete ones do not count."""
    return max(_whole_checkpoints(output_dir), key=step_of, default=None)


def remove_older_checkpoints(output_dir: str | os.PathLike, keep: int | None, best: str | None) -> None:
    """Remove the oldest whole checkpoints but `keep`; never the newest or the `best` one. None keeps all."""
    checkpoints = sorted(_whole_checkpoints(output_dir), key=step_of)
    if not keep or keep < 0:
        return
    kept_anyway = {checkpoints[-1].name, Path(best).name if best else checkpoints[-1].name}
    removable = [folder for folder in checkpoints if folder.name not in kept_anyway]
    for folder in removable[: max(len(checkpoints) - max(keep, len(kept_anyway)), 0)]:
        (folder / WHOLE).unlink()  # first: killed in the middle, it is no checkpoint
        shutil.rmtree(folder, ignore_errors=True)


def _whole_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    markers = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{WHOLE}")
    return [marker.parent for marker in markers if step_of(marker.parent) is not None]


def step_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint, by its name; None of another folder."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else None


def refuse_other_run(shown: Path, file: Path, run: Mapping[str, Any]) -> None:
    """Raise ValueError if what a file stores as its run is not this one; `shown` is named."""
    stored = _read_object(file).get("run")
    stored = stored if isinstance(stored, dict) else {}
    now = json.loads(json.dumps(run))  # as it would be stored
    changed = sorted(key for key in stored.keys() | now.keys() if stored.get(key) != now.get(key))
    if changed:
        first, others = changed[0], f"; also {', '.join(changed[1:])}" if changed[1:] else ""
        raise ValueError(
            f"{shown} is of another run: {first} was {stored.get(first)!r}, is {now.get(first)!r}{others}. Give "
            "another --output_dir, or the settings of that run to resume it"
        )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it to resume without it") from error
    return content if isinstance(content, dict) else {}


def _is_whole(out: Path) -> bool:
    """Whether a finished run's record and all files that it names are there."""
    if not (out / TRAINING_RECORD).exists():
        return False
    files = _read_object(out / TRAINING_RECORD).get("files")
    return isinstance(files, dict) and bool(files) and files == _saved_files(out)


def _saved_files(out: Path) -> dict[str, int]:
    """Size in bytes of the files that a model in a folder is loaded from."""
    files = (file for file in sorted(out.iterdir()) if file.suffix in _SAVED and not file.name.startswith("."))
    return {file.name: file.stat().st_size for file in files if file.name != TRAINING_RECORD and file.is_file()}


def write_record(
    out: Path, run: Mapping[str, Any], log: Iterable[Mapping[str, Any]], skipped: Iterable[SkippedItem]
) -> None:
    """Write what made a model, last of all: with it the run is finished. But for `times` it is the same each time."""
    entries, times = [], []
    for entry in log:
        # Transformers' mean over the steps since the run was resumed
        entry = {name: value for name, value in entry.items() if name != "train_loss"}
        timing = {name: value for name, value in entry.items() if _TIMES.search(name)}
        entries.append({name: value for name, value in entry.items() if name not in timing})
        if timing:
            times.append({"step": entry["step"], **timing})
    items, files = list(skipped), _saved_files(out)
    sync_files(out / name for name in files)  # the record says that they are there, also after a power failure
    record = {
        "run": run,
        "skipped_pictures": sorted({item.image for item in items if item.region is None}),
        "skipped_regions": sorted({item.name for item in items if item.region is not None}),
        "log": entries,
        "files": files,
        "times": times,
    }
    write_json(out / TRAINING_RECORD, record)


@contextlib.contextmanager
def naming_what_cannot_be_written(what: str, output_dir: str | os.PathLike) -> Iterator[None]:
    """Turn an error of writing into an OSError that says where the run will resume."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not cannot_write(error):
            raise
        last = last_whole_checkpoint(output_dir)
        raise OSError(
            f"cannot write {what} ({one_line(error)[:200]}); is the disk full? The last whole checkpoint is "
            f"{last or 'none'}: make room, then rerun the same command to resume from there"
        ) from error
