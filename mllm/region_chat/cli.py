"""`region-chat`, after its arguments have been parsed (`alpha_clip_commands.region_chat`)."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from alpha_clip_commands.command_line import hide_loading_bars, json_line, say
from alpha_clip_commands.region_options import REGION_OPTIONS, region_in

if TYPE_CHECKING:
    from vision_tower import Region


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 0, or 1 if batch requests failed."""
    if args.batch:
        return _batch(args)
    import msgspec

    from mllm.overlay import check_overlay
    from mllm.region_chat.records import SingleAnswer
    from mllm.region_chat.repl import Conversation
    from vision_tower import AlphaCLIPImageProcessor

    reads = files_read(args)
    image = AlphaCLIPImageProcessor().fetch_images(args.image)
    region = region_from_arguments(args)
    if region is not None:
        region.mask(image.height, image.width)  # raises if it does not fit the image, before the model is loaded
    if args.save_overlay is not None:
        check_overlay(args.save_overlay, reads=reads)
    chat = load_chat(args)
    conversation = Conversation(
        chat, args.image, image, region, args.max_new_tokens, reads, embedded=args.model is None
    )
    if args.ask is None and not args.json:
        return conversation.run(sys.stdin, overlay=args.save_overlay)
    answer = conversation.ask(args.ask, stream=not args.json)
    if args.json:
        record = SingleAnswer(args.image, region.to_json(), args.ask, answer, args.model or "embedded")
        print(json_line(msgspec.to_builtins(record)))
    if args.save_overlay is not None:
        conversation.save_overlay(args.save_overlay)
    return 0


def region_from_arguments(args: argparse.Namespace) -> Region | None:
    """The region of the command line, or None without one.

    Raises:
        ValueError: If it is invalid.
    """
    from vision_tower import Region

    given = region_in(args)
    if given is None:
        return Region.whole() if args.whole else None
    option, value = given
    region = Region.parse(f"{REGION_OPTIONS[option][0]}:{value}")
    if args.strength is None:
        return region
    if region.strength != 1:
        raise ValueError(f"two strengths: {region.strength} in --{option} and --strength {args.strength}")
    return dataclasses.replace(region, strength=args.strength)


def files_read(args: argparse.Namespace) -> list[str]:
    """The files and folders that the flags name, which no output may replace."""
    named = (args.image, args.batch, args.mask, args.rle, args.model, args.adapter, args.alpha_weights)
    return [name for name in named if name]


def load_chat(args: argparse.Namespace):
    """Load the model that the flags specify, and print one line about it to stderr."""
    from mllm import RegionChat

    hide_loading_bars()
    chat = RegionChat.from_pretrained(
        args.model,
        device=args.device,
        device_map=args.device_map,
        dtype=args.dtype,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        attn_implementation=args.attn_implementation,
        alpha_weights=args.alpha_weights,
        load_in=args.load_in,
        adapter=args.adapter,
        compile=args.compile,
    )
    parts = {
        "model": args.model or "embedded model (synthetic scenes only, no photographs)",
        "device": chat.model.device,
        "dtype": chat.model.get_input_embeddings().weight.dtype,  # BLIP-2 keeps its Q-Former in float32
        "attention": chat.model.config.text_config._attn_implementation,
        "alpha weights": args.alpha_weights,
        "adapter": args.adapter,
        "language model in": args.load_in,
    }
    say(" | ".join(f"{name}: {value}" for name, value in parts.items() if value), sys.stderr)
    return chat


def _batch(args: argparse.Namespace) -> int:
    from mllm.locks import locked
    from mllm.region_chat.batch import read_requests, run_batch
    from mllm.region_chat.batch_output import BatchOutput

    output = BatchOutput(args.output)
    requests = read_requests(args.batch)
    with locked(output.path):
        folder = Path(args.batch).resolve().parent
        named = (file for request in requests for file in request.files(folder))
        output.check([Path(args.batch), *named])  # before the model is loaded
        failed = run_batch(
            load_chat(args),
            args.batch,
            requests,
            output,
            model_name=args.model or "embedded",
            batch_size=args.batch_size or 16,
            max_new_tokens=args.max_new_tokens,
            retry_failed=args.retry_failed,
            max_errors=args.max_errors,
        )
    if failed:
        say(
            f"region-chat: {failed} request(s) failed; their errors are in {args.output}. Failed requests are not "
            "retried on resume; use --retry-failed",
            file=sys.stderr,
        )
    return 1 if failed else 0
