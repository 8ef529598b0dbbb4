"""`alpha-clip attention-map`: draw where an Alpha-CLIP looks and what it sees there.

The whole image comes first, then each region. A row shows the picture with its region, the attention of the class token
(CLS) to the patches in the last block, over the picture as the model gets it, and with texts how near each of them is.
A tower without texts is enough without them.
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
from mllm.quiet import CUT_OFF, dropping
from vision_tower import (
    AlphaCLIPImageProcessor,
    AlphaCLIPModel,
    AlphaCLIPProcessor,
    AlphaCLIPVisionModel,
    Region,
)
from vision_tower.alpha_embedding import ALPHA_MEAN, ALPHA_STD

PROGRAM = "attention_map.py"  # in the PNGs that it may replace
_PANEL, _GAP, _TITLE, _CAPTION = 384, 24, 112, 34  # pixels
_ENTRY = 54  # pixels of a text and its bar
# from no attention to the most: nine colours of matplotlib's "inferno", whose lightness rises evenly
_COLOURS = np.array(
    [
        *((0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85)),
        *((227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164)),
    ],
    np.float32,
)
_OUTLINE = (0, 255, 255)  # of the region on the heat map: in no colour of the map
_INK, _PALE, _BAR, _BEST = (30, 30, 30), (110, 110, 110), (150, 170, 200), (40, 100, 200)
_BESIDE = (236, 236, 236)  # beside a picture that is not square, and behind a bar


class Look(NamedTuple):
    """What the model makes of one region.

    Attributes:
        region: In pixels of the picture.
        seen: RGB uint8 (S, S, 3), the picture as the model gets it.
        alpha: float (S, S) in [0, 1], as the model gets it.
        attention: float (S / patch, S / patch), of CLS to the patches; with CLS's to itself it adds up to 1.
        cosines: Of the region and each text, (texts,).
        shares: Softmax of the cosines times the model's scale, (texts,).
    """

    region: Region
    seen: np.ndarray
    alpha: np.ndarray
    attention: np.ndarray
    cosines: np.ndarray
    shares: np.ndarray


def run(args: argparse.Namespace) -> int:
    """Draw, and say so; returns the exit code."""
    named = [text.partition(":")[2] for text in args.regions if text.startswith(("mask:", "rle:"))]
    check_replaceable(args.out, reads=[args.image, args.model, *named], kind=PROGRAM)
    image = load_image(args.image)
    regions = [Region.whole(), *map(Region.parse, args.regions)]
    for region in regions:
        region.mask(image.height, image.width)  # before the model is loaded: does it fit the image?
    model, processor = load(args.model, with_text=bool(args.text), device=args.device, revision=args.revision)
    config = model.config.vision_config if args.text else model.config
    heads = read_heads(args.heads, config.num_attention_heads)
    say(f"model: {args.model} | device: {model.device} | dtype: {model.dtype} | attention: eager", sys.stderr)
    with dropping(*CUT_OFF):
        looks = look(model, processor, image, regions, args.text, heads)
    chosen = "mean of all heads" if args.heads is None else f"heads {', '.join(str(head + 1) for head in heads)}"
    names = ["whole image", *(f"{number}: {text}" for number, text in enumerate(args.regions, 1))]
    title = f"{Path(args.model).name} on {Path(args.image).name}"
    with dropping(*CUT_OFF):
        page = draw(image, looks, names, args.text, title, f"attention of CLS, last block, {chosen}")
    save_png(args.out, page, PROGRAM)
    say(f"wrote {args.out}")
    return 0


def load(name: str, *, with_text: bool, device: str, revision: str | None):
    """The model in eval mode, with attention that can be read, and what prepares its pictures: both towers and a
    processor with texts, else the vision tower and an image processor.

    Raises:
        ValueError: If it is no CLIP or Alpha-CLIP, or cannot be had without network.
    """
    device = pick_device(device)
    check_model(name)
    hub = {"revision": revision, **offline_options(name)}
    model_class, processor_class = (
        (AlphaCLIPModel, AlphaCLIPProcessor) if with_text else (AlphaCLIPVisionModel, AlphaCLIPImageProcessor)
    )
    model = model_class.from_pretrained(name, attn_implementation="eager", dtype=torch.float32, **hub)
    processor = processor_class.from_pretrained(name, **hub)
    if with_text and not isinstance(processor.image_processor, AlphaCLIPImageProcessor):  # a plain CLIP's
        processor.image_processor = AlphaCLIPImageProcessor.from_pretrained(name, **hub)
    return model.to(device).eval(), processor


def read_heads(text: str | None, count: int) -> list[int]:
    """Indices, from 0, of heads given as 1-based numbers with commas; all where none are given.

    Raises:
        ValueError: If one is not a head of this model.
    """
    if text is None:
        return list(range(count))
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= count for part in parts):
        raise ValueError(f"expected --heads as numbers from 1 to {count} with commas, got {text!r}")
    return [int(part) - 1 for part in parts]


@torch.no_grad()
def look(
    model: AlphaCLIPModel | AlphaCLIPVisionModel,
    processor: AlphaCLIPProcessor | AlphaCLIPImageProcessor,
    image: Image.Image,
    regions: list[Region],
    texts: Sequence[str],
    heads: Sequence[int],
) -> list[Look]:
    """Show the model each region of a picture.

    Args:
        model: Both towers where there are texts, loaded with `attn_implementation="eager"`.
        processor: Its processor.
        image: RGB.
        regions: In pixels of the picture.
        texts: To compare with.
        heads: Indices of the heads whose mean is taken.

    Raises:
        ValueError: If a region does not fit the picture, or a text is too long.
    """
    tower = model.vision_model if texts else model
    images = processor.image_processor if texts else processor
    pixels = processor(images=image, regions=regions, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    seen = ((pixels[:, :3] * std + mean).clip(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    alpha = (pixels[:, 3] * ALPHA_STD + ALPHA_MEAN).clip(0, 1).numpy()
    output = tower(pixels.to(model.device), output_attentions=True)
    # (regions, heads, tokens, tokens) of the last block; token 0 is CLS
    attention = output.attentions[-1][:, list(heads), 0, 1:].mean(1).cpu().numpy()
    side = pixels.shape[-1] // tower.config.patch_size
    cosines = shares = torch.empty(len(regions), 0)
    if texts:
        embedded = torch.nn.functional.normalize(model.visual_projection(output.pooler_output), dim=-1).cpu()
        cosines = embedded @ embed_texts(model, processor, texts).T
        shares = (model.logit_scale.exp().cpu() * cosines).softmax(-1)
    maps = attention.reshape(-1, side, side)
    return [Look(*row) for row in zip(regions, seen, alpha, maps, cosines.numpy(), shares.numpy(), strict=True)]


def draw(
    image: Image.Image,
    looks: Sequence[Look],
    names: Sequence[str],
    texts: Sequence[str],
    title: str,
    heading: str,
) -> Image.Image:
    """A row for each look under a title: picture and region with its name, attention (`heading`), texts if any."""
    right, bottom = panel_box(len(looks) - 1, 2 if texts else 1, len(texts))[2:]
    page = Image.new("RGB", (right + _GAP, bottom + _CAPTION + _GAP), "white")
    pen = ImageDraw.Draw(page)
    _write(pen, (_GAP, 18), title, 24, _INK, right - _GAP)
    headings = ("image and region", heading, "texts: softmax and cosine")
    for column in range(3 if texts else 2):
        x0, y0, x1, _ = panel_box(0, column, len(texts))
        _write(pen, (x0, y0 - 26), headings[column], 16, _PALE, x1 - x0)
    _draw_scale(page, panel_box(0, 1, len(texts)))
    for row, one in enumerate(looks):
        left = panel_box(row, 0, len(texts))
        pen.rectangle((left[0], left[1], left[2] - 1, left[3] - 1), fill=_BESIDE)
        _paste_centred(page, _outlined(image, one.region), left)
        _write(pen, (left[0], left[3] + 6), names[row], 16, _INK, _PANEL)
        middle = panel_box(row, 1, len(texts))
        page.paste(heat_map(one), middle[:2])
        _write(pen, (middle[0], middle[3] + 6), _numbers(one), 16, _INK, _PANEL)
        if texts:
            _draw_bars(pen, panel_box(row, 2, len(texts)), texts, one)
    return page


def panel_box(row: int, column: int, texts: int) -> tuple[int, int, int, int]:
    """Where a panel is on the page, x0, y0, x1, y1 in pixels; a row is as high as its texts need."""
    height = max(_PANEL, texts * _ENTRY)
    x, y = _GAP + column * (_PANEL + _GAP), _TITLE + row * (height + _CAPTION + _GAP)
    return x, y, x + _PANEL, y + _PANEL if column < 2 else y + height


def heat_map(one: Look) -> Image.Image:
    """The attention over the picture as the model gets it, grey and dimmed so that it reads on light pictures too, the
    region's edge on it. The scale ends at the largest value.
    """
    size = (_PANEL, _PANEL)
    grey = np.asarray(Image.fromarray(one.seen).convert("L").resize(size, Image.Resampling.BICUBIC), np.float32)
    heat = Image.fromarray((one.attention / one.attention.max()).astype(np.float32))
    pixels = _over(np.asarray(heat.resize(size, Image.Resampling.BILINEAR)).clip(0, 1), grey)
    inside = np.asarray(Image.fromarray(_mask(one.alpha)).resize(size, Image.Resampling.BILINEAR)) >= 0.5
    if not one.region.is_whole:
        core = inside
        for _ in range(2):  # pixels of the line
            core = core & np.roll(core, 1, 0) & np.roll(core, -1, 0) & np.roll(core, 1, 1) & np.roll(core, -1, 1)
        pixels[inside & ~core] = _OUTLINE
    return Image.fromarray(pixels)


def _mask(alpha: np.ndarray) -> np.ndarray:
    """Alpha before strength: 1 in the region, 0 where it is least."""
    return np.ones_like(alpha) if alpha.min() == 1 else (alpha - alpha.min()) / (1 - alpha.min())


def _over(heat: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Values (H, W) in [0, 1] as colours over grey ones in 0..255: uint8 (H, W, 3)."""
    stops = np.linspace(0, 1, len(_COLOURS))
    colour = np.stack([np.interp(heat, stops, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
    opacity = 0.8 * heat[..., None]
    return np.rint((1 - opacity) * (25 + 0.5 * grey[..., None]) + opacity * colour).astype(np.uint8)


def _outlined(image: Image.Image, region: Region) -> Image.Image:
    """The picture fitted into a panel first, so that the outline is equally wide in all pictures."""
    scale = _PANEL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.LANCZOS)
    if region.is_whole:
        return draw_overlay(small, Region.whole())
    mask = Image.fromarray(region.mask(image.height, image.width, warn=False)).resize(size, Image.Resampling.BILINEAR)
    return draw_overlay(small, Region.from_mask(np.asarray(mask).clip(0, 1), strength=region.strength))


def _numbers(one: Look) -> str:
    """What the colours cannot say: the end of the scale, and how much falls into the region beside its area."""
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
    """The colours from no attention to the most, above the heading."""
    pen, (_, y0, x1, _) = ImageDraw.Draw(page), panel
    strip = _over(np.linspace(0, 1, 140)[None].repeat(12, 0), np.float32(128))
    page.paste(Image.fromarray(strip), (x1 - 186, y0 - 50))
    pen.text((x1 - 194, y0 - 44), "0", fill=_PALE, font=ImageFont.load_default(14), anchor="rm")
    pen.text((x1, y0 - 44), "peak", fill=_PALE, font=ImageFont.load_default(14), anchor="rm")


def _draw_bars(pen: ImageDraw.ImageDraw, panel: tuple[int, int, int, int], texts: Sequence[str], one: Look) -> None:
    x0, y0, x1, _ = panel
    for index, (text, share, cosine) in enumerate(zip(texts, one.shares, one.cosines, strict=True)):
        y = y0 + index * _ENTRY
        best = index == int(one.shares.argmax())
        numbers = f"{share:.1%}   {cosine:.3f}"
        font = ImageFont.load_default(16)
        pen.text((x1, y), numbers, fill=_INK, font=font, anchor="ra")
        _write(pen, (x0, y), text, 16, _BEST if best else _INK, x1 - x0 - int(font.getlength(numbers)) - 16)
        pen.rectangle((x0, y + 24, x1, y + 36), fill=_BESIDE)
        if (length := round(float(share) * (x1 - x0))) > 0:
            pen.rectangle((x0, y + 24, x0 + length, y + 36), fill=_BEST if best else _BAR)


def _paste_centred(page: Image.Image, picture: Image.Image, panel: tuple[int, int, int, int]) -> None:
    x0, y0, x1, y1 = panel
    page.paste(picture, ((x0 + x1 - picture.width) // 2, (y0 + y1 - picture.height) // 2))


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, ink: tuple[int, int, int], width: int
) -> None:
    """One line, cut off with three dots where it is wider than `width` pixels."""
    font = ImageFont.load_default(size)
    text = " ".join(text.split())
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    pen.text(at, text, fill=ink, font=font)
