"""As `alpha-clip convert-lavis`, from a clone: `python scripts/convert_lavis_blip2.py --help`."""

import sys

from alpha_clip_commands.alpha_clip import main

if __name__ == "__main__":
    sys.exit(main(["convert-lavis", *sys.argv[1:]]))
