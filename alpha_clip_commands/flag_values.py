"""The values of flags: text -> number, switch or text, or an error of one line."""

from __future__ import annotations

import argparse
import math


def finite_number(text: str) -> float:
    """A number that is not NaN or infinite.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r:.80}")
    return number


def fraction(text: str) -> float:
    """A number from 0 to 1.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:  # also NaN
        raise argparse.ArgumentTypeError(f"expected a fraction from 0 to 1, got {text!r:.80}")
    return number


def whole_number(text: str) -> int:
    """A whole number of up to 32 bits.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or not -(2**31) <= number < 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number of up to 32 bits, got {text!r:.80}")
    return number


def plain_text(text: str) -> str:
    """Text that can be written and passed to the system.

    Raises:
        argparse.ArgumentTypeError: If it has NUL characters.
    """
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"expected text without NUL characters, got {text!r:.80}")
    return text


def switch(text: str) -> bool:
    """True or false in the words that Transformers takes.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(
        f"Truthy value expected: got {text} but expected one of yes/no, true/false, t/f, y/n, 1/0 (case insensitive)."
    )


def positive_number(text: str) -> int:
    """A whole number from 1.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    if (number := whole_number(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return number
