"""Publish a tower, a LLaVA or BLIP-2 with one, or a LoRA adapter, with a model card filled from what the folder says.

    python scripts/push_to_hub.py DIR OWNER/NAME --built-from alpha-clip llava-1.5 [--base-model ID] [--private]
    python scripts/push_to_hub.py DIR OWNER/NAME --to FOLDER      writes what would be uploaded, without network

A README.md in DIR is somebody's own card: it is kept as it is with --keep-card, and an error without.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from mllm.loading import hub_answers
from mllm.model_card import LICENCES, model_card

# what only the machine that trained can use, or that names its folders
_NOT_PUBLISHED = ("checkpoint-*", "runs", "*.tmp", "training_args.bin", "training_record.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 after an error of one line, with nothing written."""
    parser = argparse.ArgumentParser(
        prog="push_to_hub.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("repo_id", metavar="OWNER/NAME")
    parser.add_argument("--built-from", nargs="+", default=[], choices=LICENCES, help="whose licences apply")
    parser.add_argument("--base-model", metavar="ID", help="hub id of the model that it was made from")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--keep-card", action="store_true", help="DIR's own README.md is the card")
    parser.add_argument("--to", metavar="FOLDER", type=Path, help="write the files there, upload nothing")
    args = parser.parse_args(argv)
    try:
        publish(args)
    except (ValueError, OSError, HFValidationError, HfHubHTTPError, LocalTokenNotFoundError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())[:600]}", file=sys.stderr)
        return 2
    print(f"wrote {args.to}" if args.to else f"published {args.repo_id}")
    return 0


def publish(args: argparse.Namespace) -> None:
    """Copy the folder with its card aside, then move it to its place or upload it.

    Raises:
        ValueError: If the folder is not whole, has a card of its own, or the hub cannot be reached.
        HFValidationError: If the name is no "owner/name".
    """
    validate_repo_id(args.repo_id)
    if args.repo_id.count("/") != 1:
        raise ValueError(f"expected OWNER/NAME, got {args.repo_id!r}")
    if not args.folder.is_dir() or not [*args.folder.glob("*.safetensors")]:
        raise ValueError(f"expected a directory with weights (*.safetensors), got {args.folder}; was it saved whole?")
    if (args.folder / "README.md").exists() and not args.keep_card:
        raise ValueError(f"{args.folder} has a README.md of its own; publish it with --keep-card, or move it away")
    if args.keep_card and not (args.folder / "README.md").exists():
        raise ValueError(f"--keep-card: {args.folder} has no README.md")
    if args.to and args.to.exists():
        raise ValueError(f"{args.to} exists; choose a new name or delete it")
    card = None
    if not args.keep_card:
        card = model_card(args.folder, args.repo_id, built_from=args.built_from, base_model=args.base_model)
    if not args.to and not hub_answers():
        raise ValueError("the hub does not answer; with --to FOLDER the files are written without it")
    if args.to:
        args.to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.to.parent if args.to else None) as folder:
        whole = Path(folder) / "published"
        shutil.copytree(args.folder, whole, ignore=shutil.ignore_patterns(*_NOT_PUBLISHED))
        if card is not None:
            card.save(whole / "README.md")
        if args.to:
            os.replace(whole, args.to)
            return
        api = HfApi()
        api.create_repo(args.repo_id, private=args.private, exist_ok=True)
        api.upload_folder(repo_id=args.repo_id, folder_path=whole, commit_message="Upload with its model card")


if __name__ == "__main__":
    raise SystemExit(main())
