"""As `alpha-clip plot`, from a clone: `python scripts/plot_training.py --help`."""

import sys

from alpha_clip_commands.alpha_clip import main

if __name__ == "__main__":
    sys.exit(main(["plot", *sys.argv[1:]]))
