"""As `alpha-clip convert`, from a clone: `python scripts/convert_alpha_clip.py --help`."""

import sys

from alpha_clip_commands.alpha_clip import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
