"""As `alpha-clip merge`, from a clone: `python scripts/merge_adapter.py --help`."""

import sys

from alpha_clip_commands.alpha_clip import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
