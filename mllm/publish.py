"""`alpha-clip publish`: publish a tower, a LLaVA, a BLIP-2 or an adapter with a generated model card."""

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

# files that are useful only where the model was trained, or that contain local paths
_NOT_PUBLISHED = (
    *(".*", "*.tmp", "__pycache__", "checkpoint-*", "global_step*", "runs", "training_args.bin"),
    *("training_record.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state*.pth"),
)
_CONNECTION_ERROR = HfHubHTTPError.__bases__[0]  # of huggingface_hub's HTTP client, not an OSError


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    try:
        publish(args)
    except _CONNECTION_ERROR as error:
        raise ValueError(one_line(error)[:600]) from error
    say(f"wrote {args.to}" if args.to else f"published {args.repo_id}")
    return 0


def publish(args: argparse.Namespace) -> None:
    """Assemble the files and the card in a new folder, then rename it or upload it in one commit.

    Raises:
        ValueError: If the folder is incomplete or has a card, or the hub is not available.
    """
    validate_repo_id(args.repo_id)
    if args.to:
        check_new(args.to)
    check_complete(args.folder)
    card = choose_card(args)
    if args.to:
        with replacing_folder(args.to, "published model", reads=[args.folder], new=True) as folder:
            gather(args, card, folder, shutil.copy2)
        return
    if not hub_is_available():
        raise ValueError("the hub is not available; use --to FOLDER to write the files without it")
    if get_token() is None:
        raise ValueError("not logged in to the hub; run `hf auth login` or set HF_TOKEN")
    with tempfile.TemporaryDirectory() as folder:
        gather(args, card, Path(folder), os.symlink)  # avoids copying many GB
        upload(args, Path(folder))


def check_complete(folder: Path) -> None:
    """Raise ValueError if a weight file is missing or truncated. `model_card` checks the config files."""
    if not folder.is_dir():
        raise ValueError(f"expected a directory, got {folder}")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"expected a model or adapter directory, got {folder} without config.json or adapter_config.json"
        )
    parts = set(read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values())
    files = sorted({*folder.glob("*.safetensors"), *(folder / part for part in parts)})
    if not files:
        raise ValueError(f"expected weights (*.safetensors) in {folder}, got none; was it saved completely?")
    for file in files:
        try:
            safe_open(file, "pt")  # reads the header and compares it with the file's size
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"{file} is missing or damaged ({error}); was it saved completely?") from error


def choose_card(args: argparse.Namespace) -> ModelCard | None:
    """The card to write; None if the folder's own is kept.

    Raises:
        ValueError: If the folder has a card without --keep-card, or has none with it.
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
    if own.exists() and not is_empty_template(own.read_text(encoding="utf-8")):
        raise ValueError(f"{args.folder} has a README.md; publish it with --keep-card, or move it away")
    return model_card(
        args.folder,
        args.repo_id,
        built_from=args.built_from,
        license=args.license,
        base_model=args.base_model,
        language=args.language,
    )


def is_empty_template(text: str) -> bool:
    """Whether a card is the hub's unfilled template, followed by PEFT's version."""
    template = ModelCard.from_template(ModelCardData()).text
    return (
        ModelCard(text, ignore_metadata_errors=True).text.split("### Framework versions")[0].strip() == template.strip()
    )


def gather(args: argparse.Namespace, card: ModelCard | None, out: Path, copy) -> None:
    """Copy the published files to `out` with `copy(file, to)`, which may also link, and write the card."""
    written = {} if card is None else {"README.md": str(card)}
    if adapter := read_json(args.folder / "adapter_config.json"):  # PEFT stores a local folder
        adapter["base_model_name_or_path"] = check_base_model(args.base_model or adapter["base_model_name_or_path"])
        written["adapter_config.json"] = json.dumps(adapter, indent=2) + "\n"
    ignored = shutil.ignore_patterns(*_NOT_PUBLISHED)
    shutil.copytree(args.folder.resolve(), out, ignore=ignored, copy_function=copy, dirs_exist_ok=True)
    for name, text in written.items():
        (out / name).unlink(missing_ok=True)  # writing through a link would change the source folder
        write_file(out / name, text)


def upload(args: argparse.Namespace, folder: Path) -> None:
    """Upload in one commit; the hub validates the card's metadata first.

    Raises:
        ValueError: If --private is given and the repository exists and is public.
    """
    api = HfApi()
    api.create_repo(args.repo_id, private=args.private, exist_ok=True)
    if args.private and not api.model_info(args.repo_id).private:  # an existing one is not changed
        raise ValueError(f"{args.repo_id} exists and is public; choose a new name, or make it private on the hub")
    api.upload_folder(repo_id=args.repo_id, folder_path=folder, commit_message="Upload with its model card")
