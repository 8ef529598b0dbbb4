"""Join images side by side: `python scripts/join_images.py A.png B.png --out C.png`."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from alpha_clip_commands.command_line import ArgumentParser, exit_code
from mllm.data.samples import load_image
from mllm.files import check_replaceable
from mllm.overlay import save_png

PROGRAM = "join_images.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--out", required=True, help="PNG to write")
    args = parser.parse_args(argv)
    check_replaceable(args.out, reads=args.images, kind=PROGRAM)
    images = [load_image(path) for path in args.images]
    gap = 12
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    joined = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        joined.paste(image, (left, 0))
        left += image.width + gap
    save_png(args.out, joined, PROGRAM)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
