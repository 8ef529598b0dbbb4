"""Types of flags for argparse: each parses a string, or raises a one-line error."""

from __future__ import annotations

import argparse
import math


def _float_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def finite_number(text: str) -> float:
    """A number that is not NaN or infinite.

    Raises:
        argparse.ArgumentTypeError: If it is anything else.
    """
    number = _float_or_nan(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r:.80}")
    return number


def fraction(text: str) -> float:
    """A number from 0 to 1.

    Raises:
        argparse.ArgumentTypeError: If it is anything else.
    """
    number = _float_or_nan(text)
    if not 0 <= number <= 1:  # also NaN
        raise argparse.ArgumentTypeError(f"expected a fraction from 0 to 1, got {text!r:.80}")
    return number


def whole_number(text: str) -> int:
    """An integer of up to 32 bits.

    Raises:
        argparse.ArgumentTypeError: If it is anything else.
    """
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or not -(2**31) <= number < 2**32:
        raise argparse.ArgumentTypeError(f"expected an integer of up to 32 bits, got {text!r:.80}")
    return number


def plain_text(text: str) -> str:
    """Text without NUL characters, which system calls reject.

    Raises:
        argparse.ArgumentTypeError: If it contains NUL characters.
    """
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"expected text without NUL characters, got {text!r:.80}")
    return text


def switch(text: str) -> bool:
    """A boolean, in the words that Transformers accepts.

    Raises:
        argparse.ArgumentTypeError: If it is anything else.
    """
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(
        f"Truthy value expected: got {text} but expected one of yes/no, true/false, t/f, y/n, 1/0 (case insensitive)."
    )


def positive_number(text: str) -> int:
    """An integer of at least 1.

    Raises:
        argparse.ArgumentTypeError: If it is anything else.
    """
    if (number := whole_number(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return number
