"""`alpha-clip publish`: publish a tower, a LLaVA, a BLIP-2 or an adapter, with a model card filled from the folder."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from alpha_clip_commands.command_line import one_line, say
from mllm.files import write_file
from mllm.folders import check_new, replacing_folder
from mllm.hub import hub_is_available
from mllm.model_card import check_base_model, model_card, read_json

# what only the machine that trained can use, or that names its folders
_NOT_PUBLISHED = (
    *(".*", "*.tmp", "__pycache__", "checkpoint-*", "global_step*", "runs", "training_args.bin"),
    *("training_record.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state*.pth"),
)
_CONNECTION_ERROR = HfHubHTTPError.__bases__[0]  # of the HTTP client that the hub's library has; no OSError


def run(args: argparse.Namespace) -> int:
    """Publish, and say so; returns the exit code."""
    try:
        publish(args)
    except _CONNECTION_ERROR as error:
        raise ValueError(one_line(error)[:600]) from error
    say(f"wrote {args.to}" if args.to else f"published {args.repo_id}")
    return 0


def publish(args: argparse.Namespace) -> None:
    """Put the folder and its card together aside, then move them to their place or upload them in one commit.

    Raises:
        ValueError: If the folder is not whole, has a card of its own, or the hub cannot be reached.
    """
    validate_repo_id(args.repo_id)
    if args.to:
        check_new(args.to)
    check_whole(args.folder)
    card = choose_card(args)
    if args.to:
        with replacing_folder(args.to, "published model", reads=[args.folder], new=True) as folder:
            gather(args, card, folder, shutil.copy2)
        return
    if not hub_is_available():
        raise ValueError("the hub does not answer; with --to FOLDER the files are written without it")
    if get_token() is None:
        raise ValueError("the hub needs to know who publishes: `hf auth login`, or its token in HF_TOKEN")
    with tempfile.TemporaryDirectory() as folder:
        gather(args, card, Path(folder), os.symlink)  # a model of many GB is not copied to be read once
        upload(args, Path(folder))


def check_whole(folder: Path) -> None:
    """Raise ValueError if a weight file is missing or cut off; the settings beside them are the card's to check."""
    if not folder.is_dir():
        raise ValueError(f"expected a directory, got {folder}")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"expected a model or adapter directory, got {folder} without config.json or adapter_config.json"
        )
    parts = set(read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values())
    files = sorted({*folder.glob("*.safetensors"), *(folder / part for part in parts)})
    if not files:
        raise ValueError(f"expected weights (*.safetensors) in {folder}, got none; was it saved whole?")
    for file in files:
        try:
            safe_open(file, "pt")  # reads the header and compares it with the file's size
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"{file} is missing or damaged ({error}); was it saved whole?") from error


def choose_card(args: argparse.Namespace) -> ModelCard | None:
    """The card to write; None where the folder's own is kept.

    Raises:
        ValueError: If the folder has a card of its own and nothing says to keep it, or has none to keep.
    """
    own = args.folder / "README.md"
    if args.keep_card:
        if not own.is_file():
            raise ValueError(f"--keep-card: {args.folder} has no README.md")
        try:
            ModelCard.load(own)
        except yaml.YAMLError as error:
            raise ValueError(f"the metadata of {own} is not YAML: {error}") from error
        return None
    if own.exists() and not is_empty_form(own.read_text(encoding="utf-8")):
        raise ValueError(f"{args.folder} has a README.md of its own; publish it with --keep-card, or move it away")
    return model_card(
        args.folder,
        args.repo_id,
        built_from=args.built_from,
        licence=args.licence,
        base_model=args.base_model,
        language=args.language,
    )


def is_empty_form(text: str) -> bool:
    """Whether a card is the hub's empty form with PEFT's version under it, in which nobody wrote a word."""
    form = ModelCard.from_template(ModelCardData()).text
    return ModelCard(text, ignore_metadata_errors=True).text.split("### Framework versions")[0].strip() == form.strip()


def gather(args: argparse.Namespace, card: ModelCard | None, out: Path, place) -> None:
    """What is published, in `out`; `place(file, to)` copies or links a file."""
    written = {} if card is None else {"README.md": str(card)}
    if adapter := read_json(args.folder / "adapter_config.json"):  # PEFT notes the folder of the machine that trained
        adapter["base_model_name_or_path"] = check_base_model(args.base_model or adapter["base_model_name_or_path"])
        written["adapter_config.json"] = json.dumps(adapter, indent=2) + "\n"
    left_out = shutil.ignore_patterns(*_NOT_PUBLISHED)
    shutil.copytree(args.folder.resolve(), out, ignore=left_out, copy_function=place, dirs_exist_ok=True)
    for name, text in written.items():
        (out / name).unlink(missing_ok=True)  # a link would be written through, into the folder itself
        write_file(out / name, text)


def upload(args: argparse.Namespace, folder: Path) -> None:
    """One commit, in which the hub checks the card's metadata first.

    Raises:
        ValueError: If it should be private and the repository is there and public.
    """
    api = HfApi()
    api.create_repo(args.repo_id, private=args.private, exist_ok=True)
    if args.private and not api.model_info(args.repo_id).private:  # `create_repo` leaves what is there as it is
        raise ValueError(f"{args.repo_id} is there and public; choose a new name, or make it private on the hub")
    api.upload_folder(repo_id=args.repo_id, folder_path=folder, commit_message="Upload with its model card")
