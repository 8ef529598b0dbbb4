"""`alpha-clip attention-map`: draw the attention of an Alpha-CLIP for the whole image and for regions.

The first row is the whole image, the others are the regions. A row shows the image with its region, the attention of
the class token (CLS) to the patches in the last block, and the similarity to each text, if there are texts. Without
texts, a vision tower is sufficient.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from alpha_clip_commands.command_line import check_model, say
from eval.region_matching import embed_texts
from mllm.data.samples import load_image
from mllm.files import check_replaceable
from mllm.hub import offline_options
from mllm.loading import pick_device
from mllm.overlay import draw_overlay, save_png
from mllm.quiet import CLIPPED, dropping
from vision_tower import (
    AlphaCLIPImageProcessor,
    AlphaCLIPModel,
    AlphaCLIPProcessor,
    AlphaCLIPVisionModel,
    Region,
)
from vision_tower.alpha_embedding import ALPHA_MEAN, ALPHA_STD

PROGRAM = "attention_map.py"  # marks the PNGs that may be replaced
_PANEL, _GAP, _TITLE, _CAPTION = 384, 24, 112, 34  # pixels
_ENTRY = 54  # height of a text and its bar, in pixels
# from no to maximum attention: nine colors of matplotlib's "inferno", whose lightness increases evenly
_COLORS = np.array(
    [
        *((0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85)),
        *((227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164)),
    ],
    np.float32,
)
_OUTLINE = (0, 255, 255)  # of the region on the heat map; not a color of the map
_INK, _PALE, _BAR, _BEST = (30, 30, 30), (110, 110, 110), (150, 170, 200), (40, 100, 200)
_BACKGROUND = (236, 236, 236)  # of images that are not square, and of bars


class RegionAttention(NamedTuple):
    """The attention and similarities of one region.

    Attributes:
        region: In pixels of the image.
        pixels: RGB uint8 (S, S, 3), the image as the model receives it.
        alpha: float (S, S) in [0, 1], as the model receives it.
        attention: float (S / patch, S / patch), of CLS to the patches; the sum with that of CLS to itself is 1.
        cosines: Cosine similarity to each text, (texts,).
        probabilities: Softmax of the cosines times the logit scale of the model, (texts,).
    """

    region: Region
    pixels: np.ndarray
    alpha: np.ndarray
    attention: np.ndarray
    cosines: np.ndarray
    probabilities: np.ndarray


def run(args: argparse.Namespace) -> int:
    """Draw the map; returns the exit code."""
    named = [text.partition(":")[2] for text in args.regions if text.startswith(("mask:", "rle:"))]
    check_replaceable(args.out, reads=[args.image, args.model, *named], kind=PROGRAM)
    image = load_image(args.image)
    regions = [Region.whole(), *map(Region.parse, args.regions)]
    for region in regions:
        region.mask(image.height, image.width)  # raises before the model is loaded if it does not fit
    model, processor = load(args.model, with_text=bool(args.text), device=args.device, revision=args.revision)
    config = model.config.vision_config if args.text else model.config
    heads = read_heads(args.heads, config.num_attention_heads)
    say(f"model: {args.model} | device: {model.device} | dtype: {model.dtype} | attention: eager", sys.stderr)
    with dropping(*CLIPPED):
        rows = attention(model, processor, image, regions, args.text, heads)
    chosen = "mean of all heads" if args.heads is None else f"heads {', '.join(str(head + 1) for head in heads)}"
    names = ["whole image", *(f"{number}: {text}" for number, text in enumerate(args.regions, 1))]
    title = f"{Path(args.model).name} on {Path(args.image).name}"
    with dropping(*CLIPPED):
        page = draw(image, rows, names, args.text, title, f"attention of CLS, last block, {chosen}")
    save_png(args.out, page, PROGRAM)
    say(f"wrote {args.out}")
    return 0


def load(name: str, *, with_text: bool, device: str, revision: str | None):
    """Load the model in eval mode with eager attention, and its processor.

    With texts these are both towers and a processor, else the vision tower and an image processor.

    Raises:
        ValueError: If it is not a CLIP or Alpha-CLIP, or is not available offline.
    """
    device = pick_device(device)
    check_model(name)
    hub = {"revision": revision, **offline_options(name)}
    model_class, processor_class = (
        (AlphaCLIPModel, AlphaCLIPProcessor) if with_text else (AlphaCLIPVisionModel, AlphaCLIPImageProcessor)
    )
    model = model_class.from_pretrained(name, attn_implementation="eager", dtype=torch.float32, **hub)
    processor = processor_class.from_pretrained(name, **hub)
    if with_text and not isinstance(processor.image_processor, AlphaCLIPImageProcessor):  # of a plain CLIP
        processor.image_processor = AlphaCLIPImageProcessor.from_pretrained(name, **hub)
    return model.to(device).eval(), processor


def read_heads(text: str | None, count: int) -> list[int]:
    """The 0-based indices of heads that are given as 1-based numbers separated by commas; all heads for None.

    Raises:
        ValueError: If the model does not have such a head.
    """
    if text is None:
        return list(range(count))
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= count for part in parts):
        raise ValueError(f"expected --heads as numbers from 1 to {count} separated by commas, got {text!r}")
    return [int(part) - 1 for part in parts]


@torch.no_grad()
def attention(
    model: AlphaCLIPModel | AlphaCLIPVisionModel,
    processor: AlphaCLIPProcessor | AlphaCLIPImageProcessor,
    image: Image.Image,
    regions: list[Region],
    texts: Sequence[str],
    heads: Sequence[int],
) -> list[RegionAttention]:
    """Compute the attention and similarities of regions of an image.

    Args:
        model: Both towers if there are texts, loaded with `attn_implementation="eager"`.
        processor: Of the model.
        image: RGB.
        regions: In pixels of the image.
        texts: To compare the regions with.
        heads: Indices of the heads that are averaged.

    Raises:
        ValueError: If a region does not fit the image, or a text is too long.
    """
    tower = model.vision_model if texts else model
    images = processor.image_processor if texts else processor
    pixels = processor(images=image, regions=regions, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    rgb = ((pixels[:, :3] * std + mean).clip(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    alpha = (pixels[:, 3] * ALPHA_STD + ALPHA_MEAN).clip(0, 1).numpy()
    output = tower(pixels.to(model.device), output_attentions=True)
    # (regions, heads, tokens, tokens) of the last block; token 0 is CLS
    of_cls = output.attentions[-1][:, list(heads), 0, 1:].mean(1).cpu().numpy()
    side = pixels.shape[-1] // tower.config.patch_size
    cosines = probabilities = torch.empty(len(regions), 0)
    if texts:
        embedded = torch.nn.functional.normalize(model.visual_projection(output.pooler_output), dim=-1).cpu()
        cosines = embedded @ embed_texts(model, processor, texts).T
        probabilities = (model.logit_scale.exp().cpu() * cosines).softmax(-1)
    maps = of_cls.reshape(-1, side, side)
    return [
        RegionAttention(*row)
        for row in zip(regions, rgb, alpha, maps, cosines.numpy(), probabilities.numpy(), strict=True)
    ]


def draw(
    image: Image.Image,
    rows: Sequence[RegionAttention],
    names: Sequence[str],
    texts: Sequence[str],
    title: str,
    heading: str,
) -> Image.Image:
    """Draw the title and a row per region: image with region and name, attention (`heading`), and texts if any."""
    right, bottom = panel_box(len(rows) - 1, 2 if texts else 1, len(texts))[2:]
    page = Image.new("RGB", (right + _GAP, bottom + _CAPTION + _GAP), "white")
    pen = ImageDraw.Draw(page)
    _write(pen, (_GAP, 18), title, 24, _INK, right - _GAP)
    headings = ("image and region", heading, "texts: softmax and cosine")
    for column in range(3 if texts else 2):
        x0, y0, x1, _ = panel_box(0, column, len(texts))
        _write(pen, (x0, y0 - 26), headings[column], 16, _PALE, x1 - x0)
    _draw_scale(page, panel_box(0, 1, len(texts)))
    for row, one in enumerate(rows):
        left = panel_box(row, 0, len(texts))
        pen.rectangle((left[0], left[1], left[2] - 1, left[3] - 1), fill=_BACKGROUND)
        _paste_centered(page, _outlined(image, one.region), left)
        _write(pen, (left[0], left[3] + 6), names[row], 16, _INK, _PANEL)
        middle = panel_box(row, 1, len(texts))
        page.paste(heat_map(one), middle[:2])
        _write(pen, (middle[0], middle[3] + 6), _numbers(one), 16, _INK, _PANEL)
        if texts:
            _draw_bars(pen, panel_box(row, 2, len(texts)), texts, one)
    return page


def panel_box(row: int, column: int, texts: int) -> tuple[int, int, int, int]:
    """The box of a panel on the page, x0, y0, x1, y1 in pixels; the height of a row depends on the number of texts."""
    height = max(_PANEL, texts * _ENTRY)
    x, y = _GAP + column * (_PANEL + _GAP), _TITLE + row * (height + _CAPTION + _GAP)
    return x, y, x + _PANEL, y + _PANEL if column < 2 else y + height


def heat_map(one: RegionAttention) -> Image.Image:
    """Draw the attention and the region's outline over the model's image, which is gray and dimmed for contrast.

    The scale ends at the largest value.
    """
    size = (_PANEL, _PANEL)
    gray = np.asarray(Image.fromarray(one.pixels).convert("L").resize(size, Image.Resampling.BICUBIC), np.float32)
    heat = Image.fromarray((one.attention / one.attention.max()).astype(np.float32))
    pixels = _over(np.asarray(heat.resize(size, Image.Resampling.BILINEAR)).clip(0, 1), gray)
    inside = np.asarray(Image.fromarray(_mask(one.alpha)).resize(size, Image.Resampling.BILINEAR)) >= 0.5
    if not one.region.is_whole:
        core = inside
        for _ in range(2):  # pixels of the line
            core = core & np.roll(core, 1, 0) & np.roll(core, -1, 0) & np.roll(core, 1, 1) & np.roll(core, -1, 1)
        pixels[inside & ~core] = _OUTLINE
    return Image.fromarray(pixels)


def _mask(alpha: np.ndarray) -> np.ndarray:
    """Alpha before strength is applied: 1 in the region, 0 at its minimum."""
    return np.ones_like(alpha) if alpha.min() == 1 else (alpha - alpha.min()) / (1 - alpha.min())


def _over(heat: np.ndarray, gray: np.ndarray) -> np.ndarray:
    """Blend values (H, W) in [0, 1] as colors with gray ones in 0..255: uint8 (H, W, 3)."""
    stops = np.linspace(0, 1, len(_COLORS))
    color = np.stack([np.interp(heat, stops, _COLORS[:, channel]) for channel in range(3)], axis=-1)
    opacity = 0.8 * heat[..., None]
    return np.rint((1 - opacity) * (25 + 0.5 * gray[..., None]) + opacity * color).astype(np.uint8)


def _outlined(image: Image.Image, region: Region) -> Image.Image:
    """Resize the image to the panel, then draw the outline, so that its width does not depend on the image size."""
    scale = _PANEL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.LANCZOS)
    if region.is_whole:
        return draw_overlay(small, Region.whole())
    mask = Image.fromarray(region.mask(image.height, image.width, warn=False)).resize(size, Image.Resampling.BILINEAR)
    return draw_overlay(small, Region.from_mask(np.asarray(mask).clip(0, 1), strength=region.strength))


def _numbers(one: RegionAttention) -> str:
    """The end of the scale, and the share of attention in the region together with the region's share of the area."""
    peak = f"peak {one.attention.max():.1%} of attention"
    if one.region.is_whole:
        return peak
    mask = _mask(one.alpha)
    side = len(one.attention)
    patch = len(mask) // side
    patches = mask[: side * patch, : side * patch].reshape(side, patch, side, patch).mean((1, 3))
    inside = float((one.attention * patches).sum() / one.attention.sum())
    return f"{peak} | region {inside:.0%} on {patches.mean():.0%} of area"


def _draw_scale(page: Image.Image, panel: tuple[int, int, int, int]) -> None:
    """Draw the color scale above the heading."""
    pen, (_, y0, x1, _) = ImageDraw.Draw(page), panel
    strip = _over(np.linspace(0, 1, 140)[None].repeat(12, 0), np.float32(128))
    page.paste(Image.fromarray(strip), (x1 - 186, y0 - 50))
    pen.text((x1 - 194, y0 - 44), "0", fill=_PALE, font=ImageFont.load_default(14), anchor="rm")
    pen.text((x1, y0 - 44), "peak", fill=_PALE, font=ImageFont.load_default(14), anchor="rm")


def _draw_bars(
    pen: ImageDraw.ImageDraw, panel: tuple[int, int, int, int], texts: Sequence[str], one: RegionAttention
) -> None:
    x0, y0, x1, _ = panel
    for index, (text, probability, cosine) in enumerate(zip(texts, one.probabilities, one.cosines, strict=True)):
        y = y0 + index * _ENTRY
        best = index == int(one.probabilities.argmax())
        numbers = f"{probability:.1%}   {cosine:.3f}"
        font = ImageFont.load_default(16)
        pen.text((x1, y), numbers, fill=_INK, font=font, anchor="ra")
        _write(pen, (x0, y), text, 16, _BEST if best else _INK, x1 - x0 - int(font.getlength(numbers)) - 16)
        pen.rectangle((x0, y + 24, x1, y + 36), fill=_BACKGROUND)
        if (length := round(float(probability) * (x1 - x0))) > 0:
            pen.rectangle((x0, y + 24, x0 + length, y + 36), fill=_BEST if best else _BAR)


def _paste_centered(page: Image.Image, image: Image.Image, panel: tuple[int, int, int, int]) -> None:
    x0, y0, x1, y1 = panel
    page.paste(image, ((x0 + x1 - image.width) // 2, (y0 + y1 - image.height) // 2))


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, ink: tuple[int, int, int], width: int
) -> None:
    """Write one line, truncated with three dots if it is wider than `width` pixels."""
    font = ImageFont.load_default(size)
    text = " ".join(text.split())
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    pen.text(at, text, fill=ink, font=font)
