"""The share of failed records, requests or samples at which a reader or a command stops."""

from __future__ import annotations

import argparse

from alpha_clip_commands.flag_values import fraction

MAX_ERRORS = 0.5
MIN_ERRORS = 20  # fewer failures never stop a run


def add_max_errors(parser: argparse._ActionsContainer, items: str) -> None:
    """Add the option --max-errors."""
    parser.add_argument(
        "--max-errors",
        type=fraction,
        default=MAX_ERRORS,
        metavar="FRACTION",
        help=f"stop if more than this share of the {items}, and at least {MIN_ERRORS}, failed (default {MAX_ERRORS})",
    )


def too_many_errors(failed: int, total: int, max_errors: float = MAX_ERRORS) -> bool:
    """Whether at least `MIN_ERRORS` of `total` items failed, and more than the share `max_errors`."""
    return failed >= MIN_ERRORS and failed > max_errors * total
