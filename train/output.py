"""The output folder of a run: its lock, where the run resumes, whether it is finished, and its training record."""

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
from alpha_clip_commands.training.renamed_settings import current_settings
from mllm.files import cannot_write, sync_files, write_json
from mllm.folders import claim_folder
from mllm.loading import EMBEDDED_MODEL
from mllm.locks import locked
from train.skipped import SKIPPED, SkippedItem

COMPLETE = "complete.json"  # written last into a checkpoint; without it the checkpoint is incomplete
_COMPLETE_BEFORE = "whole.json"  # its name in earlier versions
TRAINING_RECORD = "training_record.json"  # written last next to a finished model
_TIMES = re.compile(r"_(runtime|time|per_second)$")
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model")  # the files that a model and its processor are loaded from


class Resumption(NamedTuple):
    """Where a run starts: at a checkpoint, from scratch (None), or not at all because it is finished."""

    checkpoint: Path | None
    finished: bool


@contextlib.contextmanager
def locked_output(args: TrainingArguments, run_config: Mapping[str, Any]) -> Iterator[Resumption]:
    """Lock the output folder of a run (in the main process of all machines), and yield where the run resumes.

    Raises:
        ValueError: If the folder was not written by this command, belongs to another run, is an input of this run, or
            is in use by another process.
        ConnectionError: If the main process failed; it prints the reason.
        OSError: If the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        resumption = None
        try:
            if args.process_index == 0:
                out = claim_folder(args.output_dir, "training", reads=input_paths(run_config), known=_is_a_run)
                stack.enter_context(locked(out, inside=True))
                resumption = _resumption(out, run_config)
                if resumption == (None, False):  # items skipped by an earlier attempt may have been fixed
                    (out / SKIPPED).unlink(missing_ok=True)
        finally:
            resumption = from_main_process(args, resumption)
        if resumption is None:
            raise ConnectionError("another process of the run failed; its error is above")
        yield resumption


def from_main_process(args: TrainingArguments, value: Any) -> Any:
    """The main process's value, on every process."""
    if args.world_size == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def input_paths(run_config: Mapping[str, Any]) -> list[str]:
    """Model, weights and data of a run."""
    inputs = [run_config.get("model") or EMBEDDED_MODEL, run_config.get("alpha_weights"), *run_config.get("data", ())]
    return [str(path) for path in inputs if path is not None]


def _is_a_run(folder: Path) -> bool:
    """Whether an earlier version trained into a folder without a marker file."""
    return (folder / TRAINING_RECORD).exists() or last_checkpoint(folder) is not None


def _resumption(out: Path, run_config: Mapping[str, Any]) -> Resumption:
    """Where a run in a folder starts.

    Raises:
        ValueError: If the folder belongs to a run with another model, data or settings.
    """
    checkpoint, record = last_checkpoint(out), out / TRAINING_RECORD
    if checkpoint is not None:
        check_same_run(checkpoint, read_completion(checkpoint), run_config)
    if not record.exists():
        return Resumption(checkpoint, finished=False)
    content = read_training_record(record)
    check_same_run(record, content, run_config)
    files = content.get("files")
    return Resumption(checkpoint, isinstance(files, dict) and bool(files) and files == _model_files(out))


def last_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint in the output folder of a run."""
    return max(_complete_checkpoints(output_dir), key=step_of, default=None)


def remove_older_checkpoints(output_dir: str | os.PathLike, keep: int | None, best: str | None) -> None:
    """Remove the oldest complete checkpoints but `keep`; never the newest or the `best` one. None keeps all."""
    checkpoints = sorted(_complete_checkpoints(output_dir), key=step_of)
    if not keep or keep < 0:
        return
    always_kept = {checkpoints[-1].name, Path(best).name if best else checkpoints[-1].name}
    removable = [folder for folder in checkpoints if folder.name not in always_kept]
    for folder in removable[: max(len(checkpoints) - max(keep, len(always_kept)), 0)]:
        _marker(folder).unlink()  # first, so that a partly removed folder is not a checkpoint
        shutil.rmtree(folder, ignore_errors=True)


def _complete_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [folder for folder in folders if step_of(folder) is not None and _marker(folder).exists()]


def _marker(checkpoint: Path) -> Path:
    """The file that marks a checkpoint as complete, which may have been written by an earlier version."""
    before = checkpoint / _COMPLETE_BEFORE
    return before if before.exists() else checkpoint / COMPLETE


def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint; None for another folder."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else None


def check_same_run(output: Path, record: Mapping[str, Any], run_config: Mapping[str, Any]) -> None:
    """Raise ValueError if an output's record belongs to a run with other settings."""
    stored = record.get("run_config")
    stored = stored if isinstance(stored, dict) else {}
    now = json.loads(json.dumps(run_config))  # as it would be stored
    changed = sorted(key for key in stored.keys() | now.keys() if stored.get(key) != now.get(key))
    if changed:
        first, others = changed[0], f"; also {', '.join(changed[1:])}" if changed[1:] else ""
        raise ValueError(
            f"{output} belongs to another run: {first} was {stored.get(first)!r}, now {now.get(first)!r}{others}. Use "
            "another --output_dir, or the settings of that run to resume it"
        )


def read_completion(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's `complete.json`, also of one written by an earlier version."""
    return _with_current_keys(_read_object(_marker(checkpoint)))


def read_training_record(file: Path) -> dict[str, Any]:
    """The content of a `training_record.json`, also of one written by an earlier version."""
    return _with_current_keys(_read_object(file))


def _with_current_keys(record: dict[str, Any]) -> dict[str, Any]:
    renamed = {"run": "run_config", "skipped_pictures": "skipped_images"}
    record = {renamed.get(key, key): value for key, value in record.items()}
    if isinstance(record.get("run_config"), dict):
        record["run_config"] = current_settings(record["run_config"])
    return record


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it to resume without it") from error
    return content if isinstance(content, dict) else {}


def _model_files(out: Path) -> dict[str, int]:
    """Size in bytes of the files that a model in a folder is loaded from."""
    files = (file for file in sorted(out.iterdir()) if file.suffix in _MODEL_FILES and not file.name.startswith("."))
    return {file.name: file.stat().st_size for file in files if file.name != TRAINING_RECORD and file.is_file()}


def write_training_record(
    out: Path, run_config: Mapping[str, Any], log: Iterable[Mapping[str, Any]], skipped: Iterable[SkippedItem]
) -> None:
    """Write the training record, the last file: it marks the run as finished. Everything except `times` is the same
    when the run is repeated.
    """
    entries, times = [], []
    for entry in log:
        # train_loss is Transformers' mean over the steps since the run was resumed
        entry = {name: value for name, value in entry.items() if name != "train_loss"}
        timing = {name: value for name, value in entry.items() if _TIMES.search(name)}
        entries.append({name: value for name, value in entry.items() if name not in timing})
        if timing:
            times.append({"step": entry["step"], **timing})
    items, files = list(skipped), _model_files(out)
    sync_files(out / name for name in files)  # before the record that lists them, in case of a power failure
    record = {
        "run_config": run_config,
        "skipped_images": sorted({item.image for item in items if item.region is None}),
        "skipped_regions": sorted({item.name for item in items if item.region is not None}),
        "log": entries,
        "files": files,
        "times": times,
    }
    write_json(out / TRAINING_RECORD, record)


@contextlib.contextmanager
def explain_write_errors(what: str, output_dir: str | os.PathLike) -> Iterator[None]:
    """Turn a write error into an OSError that states where the run will resume."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not cannot_write(error):
            raise
        last = last_checkpoint(output_dir)
        raise OSError(
            f"cannot write {what} ({one_line(error)[:200]}); is the disk full? Free some space, then rerun the same "
            f"command to resume. The last complete checkpoint is {last or 'none'}"
        ) from error
