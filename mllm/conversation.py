"""The conversation of `region-chat`: questions and commands, line by line."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from PIL import Image
from transformers import TextStreamer

from mllm.answering import RegionChat, Turn
from mllm.chat import REGION_OPTIONS
from mllm.data.samples import load_image
from mllm.data.templates import DESCRIBE_REGION
from mllm.overlay import check_folder, keep_picture, save_overlay
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


class Conversation:
    """A picture, a region of it, and the turns about them. Another picture or region starts anew."""

    def __init__(
        self, chat: RegionChat, image_name: str, image: Image.Image, region: Region | None, max_new_tokens: int
    ) -> None:
        self.chat = chat
        self.image_name = image_name
        self.image = image
        self.region = region
        self.max_new_tokens = max_new_tokens
        self.history: list[Turn] = []

    def run(self, lines: TextIO, *, overlay: str | None = None) -> int:
        """Answer line by line until the end of input or /quit; a mistake costs one line and changes nothing.

        Returns the exit code: 2 when lines came from a file or a pipe and one of them failed, so that a script sees it.
        """
        failed = False
        if lines.isatty():
            print(f"{self.image_name}, {self._region_name()}; /help lists the commands", file=sys.stderr)
        while True:
            if lines.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = lines.readline()
            if not line or line.strip() in ("/quit", "/exit"):
                return 2 if failed and not lines.isatty() else 0
            try:
                self._line(line.strip())
                if overlay and self.history:
                    self.save_overlay(overlay)
            except (ValueError, OSError) as error:
                failed = True
                still = f" (still about {self._region_name()})" if line.startswith("/") and self.region else ""
                print(f"error: {' '.join(str(error).split())}{still}", file=sys.stderr)

    def ask(self, question: str | None, *, stream: bool = True) -> str:
        """Answer a question and remember the turn.

        Raises:
            ValueError: If there is no region yet, or the conversation is longer than the model's context.
        """
        if self.region is None:
            raise ValueError("no region yet; give one with /box, /mask, ... or /whole")
        streamer = (
            TextStreamer(self.chat.processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        )
        answer = self.chat.answer(
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
        keep_picture(self.image_name, path)
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
            self._set_region(Region.parse(f"{REGION_OPTIONS[command][0]}:{value.strip()}"))
        elif command == "whole":
            self._set_region(Region.whole())
        elif command == "reset":
            self._forget("the turns so far are forgotten")
        elif command == "help":
            print(HELP, file=sys.stderr)
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
        self.image_name, self.region = path, None
        self._forget(f"now {path} ({self.image.width} x {self.image.height} pixels); give a region")

    def _overlay(self, path: str) -> None:
        self.save_overlay(path)
        print(f"wrote {path}", file=sys.stderr)

    def _forget(self, message: str) -> None:
        self.history = []
        print(message, file=sys.stderr)

    def _save(self, path: str) -> None:
        check_folder(path)
        keep_picture(self.image_name, path)
        record = {
            "image": self.image_name,
            "region": None if self.region is None else self.region.to_json(),
            "turns": [{"question": question, "answer": answer} for question, answer in self.history],
        }
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        print(f"wrote {path}: {len(self.history)} turns", file=sys.stderr)

    def _region_name(self) -> str:
        return "no region yet" if self.region is None else f"region {self.region}"
