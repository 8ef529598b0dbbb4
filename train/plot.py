"""`alpha-clip plot`: draw the curves that a training run logged: loss, and what its evaluations measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from alpha_clip_commands.command_line import say
from mllm.files import check_replaceable
from mllm.overlay import save_png

PROGRAM = "plot_training.py"  # in the PNGs that it may replace
WIDTH, HEIGHT, MARGIN = 420, 240, 58
_LINE, _GRID, _INK = (31, 90, 166), (222, 222, 222), (40, 40, 40)


def run(args: argparse.Namespace) -> int:
    """Draw, and say so; returns the exit code."""
    check_replaceable(args.out, kind=PROGRAM)
    draw(args.runs, args.out)
    say(f"wrote {args.out}")
    return 0


def draw(runs: Sequence[Path], out: Path) -> None:
    """Write a PNG with a row of charts a run.

    Raises:
        ValueError: If a run logged no loss.
        OSError: If its record cannot be read, or the picture not be written.
    """
    rows = [[chart(f"{run.name}: {name}", points) for name, points in curves(run).items()] for run in runs]
    page = Image.new("RGB", (WIDTH * max(map(len, rows)), HEIGHT * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            page.paste(picture, (x * WIDTH, y * HEIGHT))
    save_png(out, page, PROGRAM)


def curves(run: Path) -> dict[str, list[tuple[float, float]]]:
    """(step, value) by what was logged: the loss, then whatever begins with `eval_` and is no time.

    Raises:
        ValueError: If the run is not finished, or logged no loss.
    """
    record = run / "training_record.json"
    if not record.exists():
        raise ValueError(f"{run} is not a finished run: training_record.json not found")
    log = json.loads(record.read_text(encoding="utf-8"))["log"]
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
    """One curve with its axes, WIDTH x HEIGHT."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
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
    for x in sorted({x0, (x0 + x1) // 2, x1}):  # steps: whole numbers
        draw.text((place(x, y0)[0], bottom + 6), f"{x:.0f}", fill=_INK, font=font, anchor="mt")
    if len(points) > 1:
        draw.line([place(*point) for point in points], fill=_LINE, width=2)
    else:
        draw.circle(place(*points[0]), 3, fill=_LINE)
    draw.text((left, 10), f"{title} (last: {points[-1][1]:.4g}; by step)", fill=_INK, font=font)
    return picture
