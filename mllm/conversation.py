"""The conversation of `region-chat`: questions and commands, line by line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from typing import TextIO

from PIL import Image
from transformers import TextStreamer

from alpha_clip_commands.chat import REGION_OPTIONS
from alpha_clip_commands.command_line import printable, say
from mllm.data.samples import load_image
from mllm.data.templates import DESCRIBE_REGION
from mllm.files import check_replaceable, made_by, one_line, write_json
from mllm.inference import RegionChat, Turn
from mllm.overlay import check_overlay, save_overlay
from vision_tower import Region

HELP = """\
a line of text asks about the region; an empty line asks for its description
/box X0,Y0,X1,Y1  /nbox ...  /polygon ...  /mask FILE  /rle FILE  /point X,Y@RADIUS  /stroke X,Y;X,Y@WIDTH  /whole
                  another region (the conversation starts anew)
/strength S       1: the region alone, 0: the whole image
/image FILE       another picture (the conversation starts anew, the region must be given again)
/overlay FILE     write the picture with its region and the last answer
/save FILE        write the conversation as JSON
/reset            forget the turns so far
/help  /quit"""

_KIND = "conversation"


class _PrintableStreamer(TextStreamer):
    """Prints an answer as it comes, without what a terminal would obey."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


class Conversation:
    """A picture, a region of it, and the turns about them. Another picture or region starts anew."""

    def __init__(
        self,
        chat: RegionChat,
        image_name: str,
        image: Image.Image,
        region: Region | None,
        max_new_tokens: int,
        reads: Iterable[str] = (),
    ) -> None:
        """Begin.

        Args:
            chat: The model.
            image_name: Path of the image.
            image: RGB.
            region: In pixels of the image; None where there is none yet.
            max_new_tokens: Longest answer.
            reads: Files and folders that no output may replace, such as the image.
        """
        self.chat = chat
        self.image_name = image_name
        self.image = image
        self.region = region
        self.max_new_tokens = max_new_tokens
        self.reads = list(reads)
        self.history: list[Turn] = []

    def run(self, lines: TextIO, *, overlay: str | None = None) -> int:
        """Answer line by line until the end of input or /quit; a mistake costs one line and changes nothing.

        Returns the exit code: 2 when lines came from a file or a pipe and one of them failed, so that a script sees it.
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
        """Answer a question and remember the turn.

        Raises:
            ValueError: If there is no region yet, or the conversation is longer than the model's context.
        """
        if self.region is None:
            raise ValueError("no region yet; give one with /box, /mask, ... or /whole")
        streamer = (
            _PrintableStreamer(self.chat.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
            if stream
            else None
        )
        answer = self.chat.ask(
            self.image,
            self.region,
            question,
            history=self.history,
            max_new_tokens=self.max_new_tokens,
            streamer=streamer,
        )
        self.history.append((DESCRIBE_REGION if question is None else question, answer))
        return answer

    def save_overlay(self, path: str) -> None:
        """Write the picture with the region and, under it, the last turn."""
        check_overlay(path, reads=self.reads)
        caption = "{} {}".format(*self.history[-1]) if self.history else None
        save_overlay(path, self.image, self.region or Region.whole(), caption)

    def _line(self, line: str) -> None:
        if not line.startswith("/"):
            self.ask(line or None)
            return
        command, _, value = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "strength": self._set_strength,
            "image": self._set_image,
            "overlay": self._overlay,
            "save": self._save,
        }
        if command in REGION_OPTIONS:
            self.reads += [value.strip()] if command in ("mask", "rle") else []
            self._set_region(Region.parse(f"{REGION_OPTIONS[command][0]}:{value.strip()}"))
        elif command == "whole":
            self._set_region(Region.whole())
        elif command == "reset":
            self._forget("the turns so far are forgotten")
        elif command == "help":
            say(HELP, sys.stderr)
        elif command not in commands:
            raise ValueError(f"unknown command /{command}; /help lists them")
        elif not value.strip():
            raise ValueError(f"/{command} needs a value; see /help")
        else:
            commands[command](value.strip())

    def _set_region(self, region: Region) -> None:
        region.mask(self.image.height, self.image.width)  # raises if it does not fit
        self.region = region
        self._forget(f"now about {self._region_name()}")

    def _set_strength(self, value: str) -> None:
        if self.region is None:
            raise ValueError("no region yet; give one first")
        self._set_region(dataclasses.replace(self.region, strength=float(value)))

    def _set_image(self, path: str) -> None:
        self.image = load_image(path)
        self.reads.append(path)
        self.image_name, self.region = path, None
        self._forget(f"now {path} ({self.image.width} x {self.image.height} pixels); give a region")

    def _overlay(self, path: str) -> None:
        self.save_overlay(path)
        say(f"wrote {path}", sys.stderr)

    def _forget(self, message: str) -> None:
        self.history = []
        say(message, sys.stderr)

    def _save(self, path: str) -> None:
        check_replaceable(path, reads=self.reads, kind=_KIND)
        record = {
            "made_by": made_by(_KIND),
            "image": self.image_name,
            "region": None if self.region is None else self.region.to_json(),
            "turns": [{"question": question, "answer": answer} for question, answer in self.history],
        }
        write_json(path, record)
        say(f"wrote {path}: {len(self.history)} turns", sys.stderr)

    def _region_name(self) -> str:
        return "no region yet" if self.region is None else f"region {self.region}"
