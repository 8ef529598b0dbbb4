"""The interactive loop of `region-chat`: one question or command per line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from typing import TextIO

from PIL import Image
from transformers import TextStreamer

from alpha_clip_commands.command_line import one_line, printable, say
from alpha_clip_commands.region_options import FORMER_OPTIONS, REGION_OPTIONS
from mllm.files import check_replaceable, write_json
from mllm.inference import RegionChat, Turn
from mllm.overlay import check_overlay, save_overlay
from mllm.quiet import CLIPPED, dropping
from mllm.region_chat.records import CONVERSATION, SavedConversation, SavedTurn
from vision_tower import Region


def _help() -> str:
    regions = [(f"/{option} {written}", text) for option, (_, written, text) in REGION_OPTIONS.items()]
    commands = [
        *regions,
        ("/whole", "the whole image"),
        ("/strength S", "1: the region alone, 0: the whole image; the turns so far are kept"),
        ("/image FILE", "another image, which needs a new region"),
        ("/overlay FILE", "write the image with its region and the last answer"),
        ("/save FILE", "write image, region and turns as JSON"),
        ("/reset", "discard the turns so far"),
        ("/help", "this list"),
        ("/quit", "quit (also /exit)"),
    ]
    return "\n".join(
        [
            "a line of text is a question about the region; an empty line requests its description",
            *(f"{command:<34}{text}" for command, text in commands),
            "another region or image starts a new conversation",
        ]
    )


HELP = _help()
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class _PrintableStreamer(TextStreamer):
    """Prints an answer as it is generated, without control characters."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


class Conversation:
    """An image, a region of it, and the turns about them. Another image or region starts a new conversation."""

    def __init__(
        self,
        chat: RegionChat,
        image_name: str,
        image: Image.Image,
        region: Region | None,
        max_new_tokens: int,
        reads: Iterable[str] = (),
        *,
        embedded: bool = False,
    ) -> None:
        """Start a conversation.

        Args:
            chat: The model.
            image_name: Path of the image.
            image: RGB.
            region: In pixels of the image; None if not given yet.
            max_new_tokens: Maximum length of an answer, in tokens.
            reads: Files and folders that no output may replace, such as the image.
            embedded: Whether the model is the embedded one, which was not trained on all kinds of regions.
        """
        self.chat = chat
        self.image_name = image_name
        self.image = image
        self.region = region
        self.max_new_tokens = max_new_tokens
        self.reads = list(reads)
        self.embedded = embedded
        self.history: list[Turn] = []
        self.strengths: list[float] = []  # of the region, in each turn
        self._warn_if_untrained()

    def run(self, lines: TextIO, *, overlay: str | None = None) -> int:
        """Answer line by line until the end of input or /quit. An invalid line changes nothing.

        Returns:
            The exit code: 2 if the lines come from a file or a pipe and one of them failed, else 0.
        """
        failed = False
        if lines.isatty():
            say(f"{self.image_name}, {self._region_name()}; /help lists the commands", sys.stderr)
        while True:
            if lines.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = lines.readline()
            if not line or line.strip() in ("/quit", "/exit"):
                return 2 if failed and not lines.isatty() else 0
            try:
                self._line(line.strip())
                if overlay is not None and self.history:
                    self.save_overlay(overlay)
            except (ValueError, OSError) as error:
                failed = True
                still = f" (still about {self._region_name()})" if line.startswith("/") and self.region else ""
                say(f"error: {one_line(error)}{still}", sys.stderr)

    def ask(self, question: str | None, *, stream: bool = True) -> str:
        """Answer a question and append the turn to the history.

        Raises:
            ValueError: If no region was given yet, or the conversation is longer than the model's context.
        """
        if self.region is None:
            raise ValueError("no region yet; give one with /box, /mask, ... or /whole")
        streamer = (
            _PrintableStreamer(self.chat.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
            if stream
            else None
        )
        with dropping(*CLIPPED):  # was logged when the region was set
            answer = self.chat.ask(
                self.image,
                self.region,
                question,
                history=self.history,
                max_new_tokens=self.max_new_tokens,
                streamer=streamer,
            )
        self.history.append((self.chat.processor.description_wordings[0] if question is None else question, answer))
        self.strengths.append(self.region.strength)
        return answer

    def save_overlay(self, path: str) -> None:
        """Write the image with its region and the last turn as caption."""
        check_overlay(path, reads=self.reads)
        caption = "{} {}".format(*self.history[-1]) if self.history else None
        with dropping(*CLIPPED):
            save_overlay(path, self.image, self.region or Region.whole(), caption)

    def _line(self, line: str) -> None:
        if not line.startswith("/"):
            self.ask(line or None)
            return
        command, value = [*line[1:].split(maxsplit=1), "", ""][:2]
        command = FORMER_OPTIONS.get(command, command)
        with_value: dict[str, Callable[[str], None]] = {
            "strength": self._set_strength,
            "image": self._set_image,
            "overlay": self._overlay,
            "save": self._save,
        }
        alone: dict[str, Callable[[], None]] = {
            "whole": lambda: self._set_region(Region.whole()),
            "reset": lambda: self._forget("discarded the turns so far"),
            "help": lambda: say(HELP, sys.stderr),
        }
        if command not in {*REGION_OPTIONS, *with_value, *alone}:
            raise ValueError(f"unknown command /{command}; see /help")
        if bool(value) == (command in alone):
            raise ValueError(f"/{command} {'takes no' if value else 'needs a'} value; see /help")
        if command in REGION_OPTIONS:
            self.reads += [value] if command in ("mask", "rle") else []
            self._set_region(Region.parse(f"{REGION_OPTIONS[command][0]}:{value}"))
        elif command in alone:
            alone[command]()
        else:
            with_value[command](value)

    def _set_region(self, region: Region) -> None:
        region.mask(self.image.height, self.image.width)  # raises if it does not fit
        self.region = region
        self._forget(f"now about {self._region_name()}")
        self._warn_if_untrained()

    def _set_strength(self, value: str) -> None:
        if self.region is None:
            raise ValueError("no region yet; give one first")
        try:
            strength = float(value)
        except ValueError:
            raise ValueError(f"expected a strength from 0 to 1, got {value!r:.80}") from None
        self.region = dataclasses.replace(self.region, strength=strength)
        say(
            f"now about {self._region_name()} at strength {self.region.strength:g}; the turns so far are kept",
            sys.stderr,
        )
        self._warn_if_untrained()

    def _set_image(self, path: str) -> None:
        self.image = self.chat.open_image(path)
        self.reads.append(path)
        self.image_name, self.region = path, None
        self._forget(f"now {path:.200} ({self.image.width} x {self.image.height} pixels); give a region")

    def _overlay(self, path: str) -> None:
        self.save_overlay(path)
        say(f"wrote {path}", sys.stderr)

    def _forget(self, message: str) -> None:
        self.history, self.strengths = [], []
        say(message, sys.stderr)

    def _warn_if_untrained(self) -> None:
        """Print a note if the embedded model was not trained on regions like this one."""
        region = self.region
        if self.embedded and region is not None and (region.kind in ("points", "stroke") or region.strength < 0.9):
            say(
                "note: the embedded model was trained on boxes and masks at strength 1; answers about other "
                "regions are often wrong (docs/shapes.md)",
                sys.stderr,
            )

    def _save(self, path: str) -> None:
        if path.lower().endswith(_IMAGE_SUFFIXES):
            raise ValueError(f"/save writes JSON, got the image name {path}; use a name in .json, or /overlay {path}")
        check_replaceable(path, reads=self.reads, kind=CONVERSATION)
        turns = [SavedTurn(*turn, strength) for turn, strength in zip(self.history, self.strengths, strict=True)]
        region = None if self.region is None else self.region.to_json()
        write_json(path, SavedConversation(self.image_name, region, turns).to_json())
        say(f"wrote {path}: {len(self.history)} turn(s)", sys.stderr)

    def _region_name(self) -> str:
        return "no region yet" if self.region is None else f"region {self.region}"
