"""`alpha-clip plot`: plot the loss and the evaluation metrics of training runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from alpha_clip_commands.command_line import say
from mllm.files import check_replaceable
from mllm.overlay import save_png
from train.output import TRAINING_RECORD, read_training_record

PROGRAM = "plot_training.py"  # written into the PNG, so that the command may replace it
WIDTH, HEIGHT, MARGIN = 420, 240, 58
_LINE, _GRID, _INK = (31, 90, 166), (222, 222, 222), (40, 40, 40)


def run(args: argparse.Namespace) -> int:
    """Plot the runs; returns the exit code."""
    check_replaceable(args.out, kind=PROGRAM)
    draw(args.runs, args.out)
    say(f"wrote {args.out}")
    return 0


def draw(runs: Sequence[Path], out: Path) -> None:
    """Write a PNG with one row of charts per run.

    Raises:
        ValueError: If a run logged no loss.
        OSError: If its record cannot be read, or the PNG cannot be written.
    """
    rows = [[chart(f"{run.name}: {name}", points) for name, points in curves(run).items()] for run in runs]
    page = Image.new("RGB", (WIDTH * max(map(len, rows)), HEIGHT * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            page.paste(image, (x * WIDTH, y * HEIGHT))
    save_png(out, page, PROGRAM)


def curves(run: Path) -> dict[str, list[tuple[float, float]]]:
    """(step, value) points of the loss and of each logged `eval_` metric, without times.

    Raises:
        ValueError: If the run is not finished, or logged no loss.
    """
    record = run / TRAINING_RECORD
    if not record.exists():
        raise ValueError(f"{run} is not a finished run: {TRAINING_RECORD} not found")
    log = read_training_record(record)["log"]
    found: dict[str, list[tuple[float, float]]] = {"loss": []}
    for entry in log:
        for name, value in entry.items():
            timing = name.endswith(("runtime", "per_second"))
            if name == "loss" or (name.startswith("eval_") and not timing):
                found.setdefault(name, []).append((float(entry["step"]), float(value)))
    if not found["loss"]:
        raise ValueError(f"{run} logged no loss; train with logging_steps below the number of steps")
    return found


def chart(title: str, points: list[tuple[float, float]]) -> Image.Image:
    """A curve with its axes, WIDTH x HEIGHT pixels."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    x1, y0, y1 = max(x1, x0 + 1), min(y0, 0.0), y1 if y1 > min(y0, 0.0) else y0 + 1
    left, right, top, bottom = MARGIN, WIDTH - 14, 30, HEIGHT - 30

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    for tick in range(5):
        value = y0 + tick * (y1 - y0) / 4
        y = place(x0, value)[1]
        draw.line([(left, y), (right, y)], fill=_GRID)
        draw.text((left - 6, y), f"{value:.3g}", fill=_INK, font=font, anchor="rm")
    for x in sorted({x0, (x0 + x1) // 2, x1}):  # steps are integers
        draw.text((place(x, y0)[0], bottom + 6), f"{x:.0f}", fill=_INK, font=font, anchor="mt")
    if len(points) > 1:
        draw.line([place(*point) for point in points], fill=_LINE, width=2)
    else:
        draw.circle(place(*points[0]), 3, fill=_LINE)
    draw.text((left, 10), f"{title} (last: {points[-1][1]:.4g}; by step)", fill=_INK, font=font)
    return image
