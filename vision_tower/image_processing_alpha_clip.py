"""Image processor of Alpha-CLIP: images and regions -> `pixel_values` with four channels."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import (
    BatchFeature,
    ImageProcessingMixin,  # noqa: F401, saved diffusers pipelines look up this name in this module
    PilBackend,
)
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ImageInput,
    PILImageResampling,
)
from transformers.processing_utils import ImagesKwargs

from .geometry import GEOMETRIES, longest_side, normalize_alpha, place_alpha, resize
from .image_decoding import MAX_PIXELS, decode_image
from .image_sources import fetch
from .region_arguments import flatten_pairs, match_regions
from .regions import Region


class AlphaCLIPImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Settings of the image processor, also accepted by the processors that contain it.

    geometry: "crop", "pad" or "stretch", see `AlphaCLIPImageProcessor`.
    regions: A region, or a list with one entry per image.
    max_pixels: Maximum width * height of an image.
    max_side: Maximum side of an image in pixels, also after padding it to a square ("pad") and after resizing it for
        the center crop ("crop").
    """

    geometry: Literal["crop", "pad", "stretch"]
    max_pixels: int
    max_side: int
    regions: Any


# Per call, these would change the image but not the alpha map, or (rescaling) misinterpret its values.
_NOT_IN_A_CALL = {"size", "crop_size", "do_resize", "do_center_crop", "do_pad", "pad_size"}
_NOT_IN_A_CALL |= {"do_rescale", "rescale_factor", "image_grid_pinpoints"}


class AlphaCLIPImageProcessor(PilBackend):
    """CLIP's image processor with regions: `pixel_values` (N, 4, S, S) float32, where S is `crop_size`.

    `geometry` selects how an image and its alpha map become S x S pixels:

    - "crop" (CLIP): resize the shortest side to S, then crop the center. A region outside the center is an error.
    - "pad" (LLaVA-1.5): pad to a square with the mean color, then resize. A region has alpha 0 in the padding.
    - "stretch" (BLIP-2): resize without keeping the aspect ratio.

    The whole image is alpha 1 everywhere, padding included. If resizing lowers the maximum of a region's mask, because
    the region is smaller than an output pixel, the mask is scaled back to that maximum: otherwise, a small region in a
    large image would be below the resolution of bfloat16.

    An image can have at most `max_pixels` (100 million) pixels. Its sides, also after padding or before the center
    crop, can have at most `max_side` (20,000) pixels.

    Example:
        >>> processor = AlphaCLIPImageProcessor.for_size(224, "pad")
        >>> region = Region.from_box(40, 60, 220, 200)
        >>> processor("photo.jpg", regions=region, return_tensors="pt")["pixel_values"]  # (1, 4, 224, 224)
    """

    valid_kwargs = AlphaCLIPImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size: Any = {"shortest_edge": 224}  # a `SizeDict` in instances, like `crop_size`
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
        del self.regions  # an argument of each call, not a setting
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
        """Create the image processor for a tower with an input of `side` x `side` pixels.

        Args:
            side: Output size in pixels, `image_size` of the tower's configuration.
            geometry: "crop", "pad" or "stretch".
            like: Image processor from which `image_mean` and `image_std` are copied; CLIP's values without it.

        Raises:
            ValueError: If `side` is not a positive integer.
        """
        if not isinstance(side, int) or side < 1:
            raise ValueError(
                f"expected the tower's side in pixels (crop_size['height'] of CLIP, 224 ...), got {side!r}"
            )
        colors = {} if like is None else {"image_mean": list(like.image_mean), "image_std": list(like.image_std)}
        crop_size = {"height": side, "width": side}
        return cls(size={"shortest_edge": side}, crop_size=crop_size, geometry=geometry, **colors)

    def to_dict(self) -> dict[str, Any]:
        """As in `PilBackend`, with an `auto_map` that lists this class for `AutoProcessor` too.

        `AutoProcessor` then raises an error if the code is not trusted. A processor that contains this one has an
        `auto_map` in its own file.
        """
        fields = super().to_dict()
        if reference := fields.get("auto_map", {}).get("AutoImageProcessor"):
            fields["auto_map"] = {"AutoImageProcessor": reference, "AutoProcessor": reference}
        return fields

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Convert images to types that Transformers supports, in the same nested lists.

        Called first by the processors that contain this one. PIL images and arrays with channels are returned
        unchanged. Other images are decoded, with the `max_pixels` of this instance, not of the call.

        Raises:
            ValueError: If an image cannot be read.
        """
        images = image_url_or_urls
        if isinstance(images, list | tuple):
            return [self.fetch_images(image) for image in images]
        is_array = isinstance(images, np.ndarray | torch.Tensor) and images.ndim != 2
        if images is None or is_array or isinstance(images, Image.Image):
            return images
        return decode_image(fetch(images), max_pixels=self.max_pixels)

    def preprocess(
        self,
        images: ImageInput,
        regions: Any = None,
        *,
        geometry: str | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare images and their regions.

        Args:
            images: One image, a list, a list of lists, or an array of images (N, H, W, 3) or (N, 3, H, W). An image
                is a path, URL, base64 text, the bytes of a file, a PIL image, a numpy array or a torch tensor; see
                `image_decoding` for value ranges, transparency and EXIF.
            regions: For one image, a region or a list of N regions, which gives N outputs but decodes and resizes the
                image once. For a list of images, a list of such entries in the same nesting. None is the whole image.
                A region is a `Region`, its JSON or its text ("box:40,60,220,200").
            geometry: "crop", "pad" or "stretch"; defaults to the processor's setting.
            return_tensors: "pt" or "np"; None returns lists of arrays.
            **kwargs: Color settings of CLIP's image processor (`do_normalize`, `image_mean`, ...), `max_side` and
                `max_pixels`.

        Returns:
            `pixel_values` (N, 4, S, S): normalized RGB and (alpha - 0.5) / 0.26.

        Raises:
            ValueError: If an image cannot be read or is too large, images and regions do not match, a region does not
                fit its image, or `kwargs` would change the geometry of the image but not of the alpha map.
        """
        geometry = self.geometry if geometry is None else geometry
        groups = self._group_regions(images, regions, geometry, kwargs)
        side = self.crop_size.height
        resample = _pil_resampling(kwargs.pop("resample", self.resample))
        fill = tuple(int(channel * 255) for channel in self.image_mean)
        sizes, resized = [], []
        for image in self._decode_images(groups, geometry, kwargs):
            sizes.append(image.size)
            resized.append(resize(image, side, geometry, fill, resample))
        del image  # frees a large image before alpha maps are computed
        rgb = super().preprocess(resized, do_resize=False, do_center_crop=False, **kwargs)["pixel_values"]
        output = np.empty((sum(len(regions) for _, regions in groups), 4, side, side), np.float32)
        row = 0
        for (width, height), pixels, (_, image_regions) in zip(sizes, rgb, groups, strict=True):
            for region in image_regions:
                output[row, :3] = pixels
                output[row, 3] = normalize_alpha(place_alpha(region, height, width, side, geometry))
                row += 1
        # from_numpy shares memory with the array
        data = torch.from_numpy(output) if return_tensors == "pt" else output
        return BatchFeature({"pixel_values": data}, tensor_type=None if return_tensors == "pt" else return_tensors)

    def _group_regions(
        self, images: ImageInput, regions: Any, geometry: str, settings: Iterable[str]
    ) -> list[tuple[Any, list[Region]]]:
        """Check the arguments of a call, and list each image with its regions.

        An image that is repeated in consecutive positions is listed once, with all of its regions.

        Raises:
            ValueError: If images and regions do not match, or the geometry or a setting is not allowed in a call.
        """
        if fixed := sorted(_NOT_IN_A_CALL.intersection(settings)):
            raise ValueError(f"{', '.join(fixed)}: pass them to the constructor of the image processor, not to a call")
        self._check_geometry(geometry)
        groups: list[tuple[Any, list[Region]]] = []
        for image, image_regions in flatten_pairs(match_regions(images, regions)):
            if groups and groups[-1][0] is image:
                groups[-1][1].extend(image_regions)
            else:
                groups.append((image, [*image_regions]))
        if not groups:
            raise ValueError("got no image: pass one image or a list of them as images=")
        return groups

    def _decode_images(
        self, groups: Iterable[tuple[Any, list[Region]]], geometry: str, settings: dict[str, Any]
    ) -> Iterator[Image.Image]:
        """Decode the images one at a time, so that only one is in memory at full size.

        The settings that are used here are removed from `settings`.

        Raises:
            ValueError: If an image cannot be read or is too large.
        """
        limits = {name: settings.pop(name, None) or getattr(self, name) for name in ("max_pixels", "max_side")}
        layout = settings.pop("input_data_format", None)
        for source, _ in groups:
            image = decode_image(fetch(source), max_pixels=limits["max_pixels"], input_data_format=layout)
            _check_side(image.size, self.crop_size.height, geometry, limits["max_side"])
            yield image

    def _check_geometry(self, geometry: str) -> None:
        if geometry not in self.geometries:
            raise ValueError(f"expected geometry {', '.join(self.geometries)}, got {geometry!r}")


def _pil_resampling(resample: Any) -> Image.Resampling:
    """PIL's filter, from its number or from the enumeration of PIL, Transformers or torchvision."""
    return Image.Resampling[resample.name] if isinstance(resample, enum.Enum) else Image.Resampling(resample)


def _check_side(size: tuple[int, int], side: int, geometry: str, max_side: int) -> None:
    width, height = size
    longest = longest_side(width, height, side, geometry)
    if longest > max_side:
        resized = f" and would be resized to {longest:,} before cropping" if longest > max(size) else ""
        raise ValueError(
            f"the image of {width} x {height} pixels is too long{resized}: expected sides up to {max_side:,} pixels; "
            "reduce its size, or increase max_side of the image processor"
        )
