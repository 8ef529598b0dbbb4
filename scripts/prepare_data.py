"""As `alpha-clip prepare`, from a clone: `python scripts/prepare_data.py --help`."""

import sys

from alpha_clip_commands.alpha_clip import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
