"""As `alpha-clip publish`, from a clone: `python scripts/push_to_hub.py --help`."""

import sys

from alpha_clip_commands.alpha_clip import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
