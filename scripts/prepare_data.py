"""As `alpha-clip prepare`, from a clone: `python scripts/prepare_data.py --help`."""

import sys
from collections.abc import Sequence

from alpha_clip_commands import alpha_clip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return alpha_clip.main(["prepare", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
