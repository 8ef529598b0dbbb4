"""As `alpha-clip attention-map`, from a clone: `python scripts/attention_map.py --help`."""

import sys

from alpha_clip_commands.alpha_clip import main

if __name__ == "__main__":
    sys.exit(main(["attention-map", *sys.argv[1:]]))
