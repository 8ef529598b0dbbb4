"""Put pictures side by side: `python scripts/join_pictures.py A.png B.png --out C.png`."""

from __future__ import annotations

import argparse

from PIL import Image


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    pictures = [Image.open(path).convert("RGB") for path in args.pictures]
    gap = 12
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    joined = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        joined.paste(picture, (left, 0))
        left += picture.width + gap
    joined.save(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
