"""Image + regions -> 4-channel `pixel_values`. One geometry moves the picture and its alpha map alike."""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import (
    BatchFeature,
    ImageProcessingMixin,  # noqa: F401, a saved diffusers pipeline looks for this name here
    PilBackend,
)
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ImageInput,
    PILImageResampling,
)
from transformers.processing_utils import ImagesKwargs

from .alpha_embedding import ALPHA_MEAN, ALPHA_STD
from .image_decoding import MAX_PIXELS, decode_image
from .image_sources import fetch
from .region_arguments import flat_pairs, match_regions
from .regions import Region

GEOMETRIES = ("crop", "pad", "stretch")


class AlphaCLIPImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Image settings and their regions; the same names may be given to the processors built on this one.

    geometry: How a picture becomes a square, see `AlphaCLIPImageProcessor`.
    regions: One region, or a list with an entry for each image.
    max_pixels: The largest width * height of an image.
    max_side: The longest side in pixels of an image, and of the square that "pad" makes of it or the image that "crop"
        cuts from.
    """

    geometry: Literal["crop", "pad", "stretch"]
    max_pixels: int
    max_side: int
    regions: Any


logger = logging.getLogger(__name__)

# they would move the picture but not the alpha map, or (rescaling) take its numbers for others than they are
_NOT_IN_A_CALL = {"size", "crop_size", "do_resize", "do_center_crop", "do_pad", "pad_size"}
_NOT_IN_A_CALL |= {"do_rescale", "rescale_factor", "image_grid_pinpoints"}
_STRIP = 4_000_000  # pixels of a padded image that are held at a time


class AlphaCLIPImageProcessor(PilBackend):
    """CLIP's image processor with regions: `pixel_values` (N, 4, S, S) float32, where S is `crop_size`.

    `geometry` says how a picture becomes an S x S square; image and alpha map always go the same way:

    - "crop" (CLIP): the shortest side to S, then the centre. A region outside the centre is an error.
    - "pad" (LLaVA-1.5): padded to a square with the mean colour, then to S x S. A region has alpha 0 in the padding.
    - "stretch" (BLIP-2): to S x S, whatever the proportions.

    The whole image is alpha 1 everywhere, padding included. A region smaller than one output pixel is scaled so that
    its peak stays what it was: after plain resizing a small region in a large photograph would be lost below bfloat16's
    resolution.

    Limits: an image may have `max_pixels` (100 million) pixels, and no side may be longer than `max_side` (20,000): of
    the image, of the square that "pad" makes, of the resized image that "crop" cuts from.
    """

    valid_kwargs = AlphaCLIPImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size: Any = {"shortest_edge": 224}  # in an instance a `SizeDict`, as `crop_size` is
    default_to_square = False
    crop_size: Any = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    geometries: tuple[str, ...] = GEOMETRIES
    geometry = "crop"
    max_pixels = MAX_PIXELS
    max_side = 20_000

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        del self.regions  # an argument of each call, never a setting
        self._valid_kwargs_names.remove("regions")
        side = self.crop_size.height
        self._check_geometry(self.geometry)
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
        """As in `PilBackend`; `auto_map` names this class for `AutoProcessor` too, which then raises an error where it
        may not run the code. (A processor around this one says what it is in its own file.)
        """
        fields = super().to_dict()
        if reference := fields.get("auto_map", {}).get("AutoImageProcessor"):
            fields["auto_map"] = {"AutoImageProcessor": reference, "AutoProcessor": reference}
        return fields

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """What the processors around this one call first: images as Transformers knows them, in the same lists.

        PIL images and arrays with channels stay what they are; of anything else, `max_pixels` of this processor is the
        limit, not that of a call.

        Raises:
            ValueError: If an image cannot be read.
        """
        images = image_url_or_urls
        if isinstance(images, list | tuple):
            return [self.fetch_images(image) for image in images]
        known = isinstance(images, Image.Image) or isinstance(images, np.ndarray | torch.Tensor) and images.ndim != 2
        return images if known or images is None else decode_image(fetch(images), max_pixels=self.max_pixels)

    def preprocess(
        self,
        images: ImageInput,
        regions: Any = None,
        *,
        geometry: str | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare images, each with its region.

        Args:
            images: One image, a list, a list of lists, or an array of images (N, H, W, 3) or (N, 3, H, W). An image
                is a path, a URL, base64 text, the bytes of a file, a PIL image, a numpy array or a torch tensor; see
                `image_decoding` for values, transparency and EXIF.
            regions: For one image: a `Region`, or a list of N regions, which gives N outputs for one decoding and
                resizing. For images in a list: a list nested like it, with such an entry for each image. None means the
                whole image. In place of a `Region`, its JSON or its text ("box:40,60,220,200") will do.
            geometry: "crop", "pad" or "stretch"; the processor's own when not given.
            return_tensors: "pt" or "np"; lists of arrays when not given.
            **kwargs: Colour settings of CLIP's image processor (`do_normalize`, `image_mean`, ...), `max_side`,
                `max_pixels`.

        Returns:
            `pixel_values` (N, 4, S, S): normalised RGB, then (alpha - 0.5) / 0.26.

        Raises:
            ValueError: If an image cannot be read or is too large, images and regions do not match, a region does not
                fit its image, or `kwargs` ask for a geometry that would move the picture but not the alpha map.
        """
        geometry = self.geometry if geometry is None else geometry
        grouped = self.grouped(images, regions, geometry, kwargs)
        side = self.crop_size.height
        resample = _resampling(kwargs.pop("resample", self.resample))
        mean = self.image_mean
        sizes, small = [], []
        for picture in self.opened(grouped, geometry, kwargs):
            sizes.append(picture.size)
            small.append(_resize(picture, side, geometry, tuple(int(channel * 255) for channel in mean), resample))
        del picture  # a large one need not be held while alpha maps are made
        rgb = super().preprocess(small, do_resize=False, do_center_crop=False, **kwargs)["pixel_values"]
        output = np.empty((sum(len(regions) for _, regions in grouped), 4, side, side), np.float32)
        row = 0
        for (width, height), pixels, (_, image_regions) in zip(sizes, rgb, grouped, strict=True):
            for region in image_regions:
                output[row, :3] = pixels
                output[row, 3] = normalized_alpha(place_alpha(region, height, width, side, geometry))
                row += 1
        # torch shares the array: no copy
        data = torch.from_numpy(output) if return_tensors == "pt" else output
        return BatchFeature({"pixel_values": data}, tensor_type=None if return_tensors == "pt" else return_tensors)

    def grouped(
        self, images: ImageInput, regions: Any, geometry: str, settings: Iterable[str]
    ) -> list[tuple[Any, list[Region]]]:
        """Each image of a call with its regions, in order.

        Raises:
            ValueError: If images and regions do not match, or there is no such geometry or setting in a call.
        """
        if moved := sorted(_NOT_IN_A_CALL.intersection(settings)):
            raise ValueError(f"{', '.join(moved)}: set them when the image processor is made, not in a call")
        self._check_geometry(geometry)
        return _grouped(flat_pairs(match_regions(images, regions)))

    def opened(
        self, grouped: Iterable[tuple[Any, list[Region]]], geometry: str, settings: dict[str, Any]
    ) -> Iterator[Image.Image]:
        """The images of `grouped`, one at a time, so that only one is held in full; `settings` lose what is used here.

        Raises:
            ValueError: If an image cannot be read or is too large.
        """
        limits = {name: settings.pop(name, None) or getattr(self, name) for name in ("max_pixels", "max_side")}
        layout = settings.pop("input_data_format", None)
        for source, _ in grouped:
            picture = decode_image(fetch(source), max_pixels=limits["max_pixels"], input_data_format=layout)
            _check_side(picture.size, self.crop_size.height, geometry, limits["max_side"])
            yield picture

    def _check_geometry(self, geometry: str) -> None:
        if geometry not in self.geometries:
            raise ValueError(f"expected geometry out of {', '.join(self.geometries)}, got {geometry!r}")


def _grouped(pairs: Iterable[tuple[Any, list[Region]]]) -> list[tuple[Any, list[Region]]]:
    """Pairs of an image and its regions; an image that stands beside itself becomes one pair with all its regions.

    Raises:
        ValueError: If there is no pair.
    """
    grouped: list[tuple[Any, list[Region]]] = []
    for image, regions in pairs:
        if grouped and grouped[-1][0] is image:
            grouped[-1][1].extend(regions)
        else:
            grouped.append((image, [*regions]))
    if not grouped:
        raise ValueError("got no image: pass one image or a list of them as images=")
    return grouped


def _resampling(resample: Any) -> Image.Resampling:
    """A filter as PIL's, from its number or the enumeration of PIL, Transformers or torchvision."""
    return Image.Resampling[resample.name] if isinstance(resample, enum.Enum) else Image.Resampling(resample)


def place_alpha(region: Region, height: int, width: int, side: int, geometry: str) -> np.ndarray:
    """The alpha map of a region of an (height, width) picture after the geometry: float32 (side, side) in [0, 1].

    Raises:
        ValueError: If the region does not fit the picture, or the centre crop cuts all of it away.
    """
    if region.is_whole:
        return np.ones((side, side), np.float32)
    mask = region.mask(height, width)
    peak = float(mask.max())
    if geometry == "crop":
        new_height, new_width, top, left = _crop_sizes(height, width, side)
        # in the picture's own pixels, before resizing spreads the region over the border of the crop
        kept = mask[
            top * height // new_height : math.ceil((top + side) * height / new_height),
            left * width // new_width : math.ceil((left + side) * width / new_width),
        ]
        peak = float(kept.max())
        if peak <= 0:
            raise ValueError(
                f"the region {region} lies outside the centre crop of the {width} x {height} image; use geometry='pad'"
            )
        if (cut := 1 - float(kept.sum() / mask.sum())) > 0.001:
            logger.warning("the centre crop cuts %.0f %% off the region %s; geometry='pad' keeps it", 100 * cut, region)
    # bilinear with antialiasing, so that no small region falls between the samples
    mask = np.asarray(_resize(mask, side, geometry, 0, Image.Resampling.BILINEAR))
    return alpha_of(with_peak(mask, peak), region.strength)


def with_peak(mask: np.ndarray, peak: float) -> np.ndarray:
    """A resized mask, scaled so that its peak stays what it was before."""
    reached = float(mask.max())
    return mask * np.float32(peak / reached) if 0 < reached < peak else mask


def alpha_of(mask: np.ndarray, strength: float) -> np.ndarray:
    """The alpha map of a mask: float32 in [0, 1], at strength 0 the whole image."""
    return 1 - np.float32(strength) * (1 - mask)


def normalized_alpha(alpha: np.ndarray) -> np.ndarray:
    """An alpha map as a tower reads it: in float64, since alpha 1 must become the very float32 that
    `AlphaPatchEmbedding` fills in for the whole image.
    """
    return (alpha.astype(np.float64) - ALPHA_MEAN) / ALPHA_STD


def _crop_sizes(height: int, width: int, side: int) -> tuple[int, int, int, int]:
    """Height and width of the resized image, top and left of the crop in it.

    Source: CLIPImageProcessor (transformers: get_resize_output_image_size, center_crop).
    """
    scaled = int(side * max(height, width) / min(height, width))
    new_height, new_width = (side, scaled) if height <= width else (scaled, side)
    return new_height, new_width, (new_height - side) // 2, (new_width - side) // 2


def _check_side(size: tuple[int, int], side: int, geometry: str, max_side: int) -> None:
    width, height = size
    longest = max(_crop_sizes(height, width, side)[:2]) if geometry == "crop" else 0
    if max(width, height, longest) > max_side:
        becomes = f" and would be resized to {longest:,} before cropping" if longest > max_side else ""
        raise ValueError(
            f"the image of {width} x {height} pixels is too long{becomes}: expected sides up to {max_side:,} pixels; "
            "make it smaller, or raise max_side of the image processor"
        )


def _resize(
    pixels: Image.Image | np.ndarray, side: int, geometry: str, fill: Any, resample: Image.Resampling
) -> Image.Image:
    """An RGB image, or a mask as float32 (H, W), as a square of side x side pixels."""
    height, width = pixels.shape if isinstance(pixels, np.ndarray) else pixels.size[::-1]
    if geometry == "pad" and height != width:
        return _resize_padded(pixels, side, fill, resample)
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    if geometry == "crop":
        new_height, new_width, top, left = _crop_sizes(height, width, side)
        return image.resize((new_width, new_height), resample).crop((left, top, left + side, top + side))
    return image.resize((side, side), resample)


def _resize_padded(pixels: Image.Image | np.ndarray, side: int, fill: Any, resample: Image.Resampling) -> Image.Image:
    """Centered on a square of `fill`, then resized: bit-equal to building that square, which of a long image could take
    all memory.

    PIL resizes in two passes with an image of the same depth between them, rows first. So rows can be padded and
    resized a few at a time, and of the padding one row is enough.

    Source: the padding is `expand2square` in haotian-liu/LLaVA, llava/mm_utils.py at c121f04.
    """
    height, width = pixels.shape if isinstance(pixels, np.ndarray) else pixels.size[::-1]
    square = max(height, width)
    top, left = (square - height) // 2, (square - width) // 2
    mode = "F" if isinstance(pixels, np.ndarray) else "RGB"
    border = Image.new(mode, (square, 1), fill).resize((side, 1), resample)
    resized = border.resize((side, square), Image.Resampling.NEAREST)
    rows = max(1, _STRIP // square)
    first, last = 0, height
    if isinstance(pixels, np.ndarray):  # rows without a region are like those of the padding
        inside = np.flatnonzero(pixels.any(axis=1))
        first, last = int(inside[0]), int(inside[-1]) + 1
    for start in range(first, last, rows):
        end = min(start + rows, last)
        if isinstance(pixels, np.ndarray):
            strip = Image.fromarray(pixels[start:end])
        else:
            strip = pixels if height <= rows else pixels.crop((0, start, width, end))
        if left or width < square:
            padded = Image.new(mode, (square, end - start), fill)
            padded.paste(strip, (left, 0))
            strip = padded
        resized.paste(strip.resize((side, end - start), resample), (0, top + start))
    return resized.resize((side, side), resample)
