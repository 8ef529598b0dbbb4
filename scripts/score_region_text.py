"""As `alpha-clip score`, from a clone: `python scripts/score_region_text.py --help`."""

import sys

from alpha_clip_commands.alpha_clip import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
