"""Image + regions -> 4-channel `pixel_values`. One geometry moves the picture and its alpha map alike."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, PilBackend
from transformers.image_transforms import to_pil_image
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ImageInput,
    PILImageResampling,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs

from .alpha_embedding import ALPHA_MEAN, ALPHA_STD
from .regions import Region

GEOMETRIES = ("crop", "pad", "stretch")


class AlphaCLIPImageProcessorKwargs(ImagesKwargs, total=False):
    """Image settings and their regions; the same names may be given to the processors built on this one.

    geometry: How a picture becomes a square, see `AlphaCLIPImageProcessor`.
    regions: One region, or a list with an entry for each image.
    """

    geometry: Literal["crop", "pad", "stretch"]
    regions: Any


logger = logging.getLogger(__name__)

# they would move the picture but not the alpha map, or (rescaling) take its numbers for others than they are
_NOT_IN_A_CALL = {"size", "crop_size", "do_resize", "do_center_crop", "do_pad", "pad_size"}
_NOT_IN_A_CALL |= {"do_rescale", "rescale_factor"}
_MISSPELT = {"region", "mask", "masks", "alpha", "alphas", "alpha_values"}


def check_processor_call(image_processor: object, names: Iterable[str]) -> None:
    """For the processors around this one: Transformers drops an argument that nobody takes, and with it the region.

    Raises:
        ValueError: If a region was passed under another name than `regions`, or the image processor takes none.
    """
    if misspelt := sorted(_MISSPELT & set(names)):
        raise ValueError(f"unknown argument {', '.join(misspelt)}: regions are passed as regions=")
    if not hasattr(image_processor, "geometry"):
        raise ValueError(
            f"{type(image_processor).__name__} would drop every region; make the processor with an "
            "AlphaCLIPImageProcessor"
        )


class AlphaCLIPImageProcessor(PilBackend):
    """CLIP's image processor with regions: `pixel_values` (N, 4, S, S) float32, where S is `crop_size`.

    `geometry` says how a picture becomes an S x S square; image and alpha map always go the same way:

    - "crop" (CLIP): the shortest side to S, then the centre. A region outside the centre is an error.
    - "pad" (LLaVA-1.5): padded to a square with the mean colour, then to S x S. A region has alpha 0 in the padding.
    - "stretch" (BLIP-2): to S x S, whatever the proportions.

    The whole image is alpha 1 everywhere, padding included. A region smaller than one output pixel is scaled so that
    its peak stays what it was: after plain resizing a small region in a large photograph would be lost below bfloat16's
    resolution.
    """

    valid_kwargs = AlphaCLIPImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    geometry = "crop"

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        del self.regions  # an argument of each call, never a setting
        self._valid_kwargs_names.remove("regions")
        side = self.crop_size.height
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"expected geometry out of {', '.join(GEOMETRIES)}, got {self.geometry!r}")
        if not (self.do_resize and self.do_center_crop and side == self.crop_size.width == self.size.shortest_edge):
            raise ValueError(
                f"expected one square output size, size {{'shortest_edge': S}}, crop_size {{'height': S, 'width': S}} "
                f"with resizing and cropping on, got size {dict(self.size)} and crop_size {dict(self.crop_size)}"
            )

    @classmethod
    def for_size(cls, side: int, geometry: str, like: Any = None) -> AlphaCLIPImageProcessor:
        """The processor for a tower of `side` x `side` pixels, with the mean and deviation of another image processor
        (`like`), CLIP's when not given.

        Raises:
            ValueError: If the size is no whole number of pixels.
        """
        if not isinstance(side, int) or side < 1:
            raise ValueError(
                f"expected the tower's side in pixels (crop_size['height'] of CLIP, 224 ...), got {side!r}"
            )
        colours = {} if like is None else {"image_mean": list(like.image_mean), "image_std": list(like.image_std)}
        crop_size = {"height": side, "width": side}
        return cls(size={"shortest_edge": side}, crop_size=crop_size, geometry=geometry, **colours)

    def to_dict(self) -> dict[str, Any]:
        """As in `PilBackend`, without the file of a processor around this one: Transformers writes it in here too."""
        fields = super().to_dict()
        if "auto_map" in fields:
            fields["auto_map"] = {name: of for name, of in fields["auto_map"].items() if name == "AutoImageProcessor"}
        return fields

    def preprocess(
        self,
        images: ImageInput,
        regions: Region | str | list | None = None,
        *,
        geometry: str | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare images, each with its region.

        Args:
            images: One image or a list: PIL, numpy or torch, (H, W, 3) or (3, H, W). EXIF orientation is applied to PIL
                images, transparency is laid onto white.
            regions: For one image: a `Region`, or a list of N regions, which gives N outputs for one decoding and
                resizing. For a list of images: a list of the same length, each entry a `Region`, None, or a list of
                regions of that image. None means the whole image. In place of a `Region` its text may stand
                ("box:40,60,220,200", `Region.parse`).
            geometry: "crop", "pad" or "stretch"; the processor's own when not given.
            return_tensors: "pt" or "np"; lists of arrays when not given.
            **kwargs: Colour settings of CLIP's image processor (`do_normalize`, `image_mean`, ...).

        Returns:
            `pixel_values` (N, 4, S, S): normalised RGB, then (alpha - 0.5) / 0.26.

        Raises:
            ValueError: If images and regions do not match, a region does not fit its image, or `kwargs` ask for a
                geometry that would move the picture but not the alpha map.
        """
        if moved := sorted(_NOT_IN_A_CALL & kwargs.keys()):
            raise ValueError(f"{', '.join(moved)}: set them when the image processor is made, not in a call")
        geometry = self.geometry if geometry is None else geometry
        if geometry not in GEOMETRIES:
            raise ValueError(f"expected geometry out of {', '.join(GEOMETRIES)}, got {geometry!r}")
        pictures = [_to_pil(image) for image in make_flat_list_of_images(self.fetch_images(_open(images)))]
        regions_by_picture = _match_regions(regions, len(pictures), images)
        side = self.crop_size.height
        rgb = super().preprocess(
            [_pad_to_square(picture, self.image_mean) if geometry == "pad" else picture for picture in pictures],
            size={"shortest_edge": side} if geometry == "crop" else {"height": side, "width": side},
            **kwargs,
        )["pixel_values"]  # a list of arrays: each is copied once, into the output
        output = np.empty((sum(map(len, regions_by_picture)), 4, side, side), np.float32)
        row = 0
        for picture, pixels, picture_regions in zip(pictures, rgb, regions_by_picture, strict=True):
            for region in picture_regions:
                output[row, :3] = pixels
                alpha = place_alpha(region, picture.height, picture.width, side, geometry)
                # in float64: alpha 1 must become the very float32 that AlphaPatchEmbedding fills in for the whole image
                output[row, 3] = (alpha.astype(np.float64) - ALPHA_MEAN) / ALPHA_STD
                row += 1
        # torch shares the array: no copy
        data = torch.from_numpy(output) if return_tensors == "pt" else output
        return BatchFeature({"pixel_values": data}, tensor_type=None if return_tensors == "pt" else return_tensors)


def _open(image: Any) -> Any:
    """A picture file with its transparency, which Transformers' `load_image` drops; it is laid onto white later."""
    if isinstance(image, list | tuple):
        return [_open(entry) for entry in image]
    return Image.open(image) if isinstance(image, str) and os.path.isfile(image) else image


def place_alpha(region: Region, height: int, width: int, side: int, geometry: str) -> np.ndarray:
    """The alpha map of a region of an (height, width) picture after the geometry: float32 (side, side) in [0, 1].

    Raises:
        ValueError: If the region does not fit the picture, or the centre crop cuts all of it away.
    """
    if region.is_whole:
        return np.ones((side, side), np.float32)
    mask = region.mask(height, width)
    peak = float(mask.max())
    if geometry == "pad" and height != width:
        square = max(height, width)
        top, left = (square - height) // 2, (square - width) // 2
        padded = np.zeros((square, square), np.float32)
        padded[top : top + height, left : left + width] = mask
        mask = padded
    if geometry == "crop":
        # the sizes and offsets of CLIPImageProcessor (transformers: get_resize_output_image_size, center_crop)
        short, long = min(height, width), max(height, width)
        scaled = int(side * long / short)
        new_height, new_width = (side, scaled) if height <= width else (scaled, side)
        top, left = (new_height - side) // 2, (new_width - side) // 2
        # in the picture's own pixels, before resizing spreads the region over the border of the crop
        kept = mask[
            top * height // new_height : math.ceil((top + side) * height / new_height),
            left * width // new_width : math.ceil((left + side) * width / new_width),
        ]
        peak = float(kept.max())
        if peak <= 0:
            raise ValueError(
                f"the region {region} lies outside the centre crop of the {width} x {height} picture; use "
                "geometry='pad'"
            )
        if (cut := 1 - float(kept.sum() / mask.sum())) > 0.001:
            logger.warning("the centre crop cuts %.0f %% off the region %s; geometry='pad' keeps it", 100 * cut, region)
        mask = _resize(mask, new_height, new_width)[top : top + side, left : left + side]
    else:
        mask = _resize(mask, side, side)
    reached = float(mask.max())
    if 0 < reached < peak:
        mask = mask * np.float32(peak / reached)
    return 1 - np.float32(region.strength) * (1 - mask)


def _resize(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with antialiasing, so that no small region falls between the samples."""
    if mask.shape == (height, width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR))


def _to_pil(image: Any) -> Image.Image:
    """The picture as displayed: coordinates of regions are those after EXIF orientation."""
    return ImageOps.exif_transpose(image if isinstance(image, Image.Image) else to_pil_image(image))


def _pad_to_square(picture: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """Source: `expand2square` in haotian-liu/LLaVA, llava/mm_utils.py at c121f04: the picture centred on the mean
    colour.
    """
    if picture.width == picture.height:
        return picture
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    square.paste(_on_white(picture), ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB, with transparency laid onto white as Transformers' `convert_to_rgb` does."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _match_regions(regions: Region | str | list | None, count: int, images: ImageInput) -> list[list[Region]]:
    """For each image the list of its regions; None becomes the whole image."""
    if not isinstance(images, list | tuple):  # one image: its region or regions
        entries = [regions]
    elif regions is None:
        entries = [None] * count
    elif isinstance(regions, Region | str):
        entries = [regions]
    else:
        entries = list(regions)
    if len(entries) != count:
        raise ValueError(f"expected one entry of regions for each of {count} images, got {len(entries)}")
    lists = [list(entry) if isinstance(entry, list | tuple) else [entry] for entry in entries]
    for entry in lists:
        if not entry:
            raise ValueError("got an image with an empty list of regions; None means the whole image")
    return [[_region(value) for value in entry] for entry in lists]


def _region(value: Any) -> Region:
    """A `Region`, the text of one, or None for the whole image."""
    if value is None:
        return Region.whole()
    if isinstance(value, str):
        return Region.parse(value)
    if not isinstance(value, Region):
        raise ValueError(
            f"expected a Region, its text ('box:40,60,220,200') or None, got {type(value).__name__}; see "
            "Region.from_box and its kin"
        )
    return value
