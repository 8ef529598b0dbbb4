"""A diffusers pipeline with our tower as its `image_encoder`: the region reaches the image, what is saved comes back.
The judge is diffusers' own `StableDiffusionImageVariationPipeline`, on tiny random parts.
"""

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil

from tests.tiny import noise_image, tiny_vision_config
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPVisionConfig, AlphaCLIPVisionModelWithProjection, Region

diffusers = pytest.importorskip("diffusers", reason="an optional dependency: pip install 'alpha-clip-mllm[generation]'")

LEFT, RIGHT = Region.from_box(0, 0, 30, 40), Region.from_box(30, 0, 60, 40)
SIZES = {"norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}


def tiny_pipeline(feature_extractor):
    torch.manual_seed(0)
    encoder = AlphaCLIPVisionModelWithProjection(AlphaCLIPVisionConfig(**tiny_vision_config()))
    torch.nn.init.normal_(encoder.vision_model.embeddings.patch_embedding.alpha.weight, std=0.3)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=encoder.config.projection_dim,
        attention_head_dim=4,
        **SIZES,
    )
    for name, weight in unet.named_parameters():
        if "attn2.to_v" in name:  # at their own size a random U-Net hardly looks at the image
            torch.nn.init.normal_(weight, std=10)
    torch.nn.init.normal_(encoder.visual_projection.weight)
    return diffusers.StableDiffusionImageVariationPipeline(
        image_encoder=encoder.eval(),
        feature_extractor=feature_extractor,
        unet=unet,
        vae=diffusers.AutoencoderKL(block_out_channels=[8], latent_channels=4, **SIZES),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True),
        safety_checker=None,
        requires_safety_checker=False,
    )


def generated(pipeline, image):
    """(H, W, 3) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    output = pipeline(image, generator=seed, num_inference_steps=2, height=8, width=8, output_type="np")
    return output.images[0]


def pixels(processor, region):
    return processor(noise_image(60, 40), region, return_tensors="pt")["pixel_values"]


@pytest.mark.slow
@pytest.mark.parametrize("extractor", ["ours", "stock"])
def test_save_and_load_a_pipeline(tmp_path, extractor):
    processor = AlphaCLIPImageProcessor.for_size(32, "stretch")
    pipeline = tiny_pipeline(processor if extractor == "ours" else CLIPImageProcessorPil())
    pipeline.save_pretrained(tmp_path)
    given = {"image_encoder": AlphaCLIPVisionModelWithProjection.from_pretrained(tmp_path / "image_encoder")}
    images = {region: generated(pipeline, pixels(processor, region)) for region in (LEFT, RIGHT)}
    assert np.abs(images[LEFT] - images[RIGHT]).max() > 1e-4  # of a random U-Net; equal inputs give equal images
    for options in ({}, given):
        again = diffusers.StableDiffusionImageVariationPipeline.from_pretrained(tmp_path, **options)
        assert type(again.image_encoder) is AlphaCLIPVisionModelWithProjection
        assert type(again.feature_extractor) is type(pipeline.feature_extractor)
        for region, image in images.items():
            assert np.array_equal(generated(again, pixels(processor, region)), image)
    if extractor == "ours":  # a PIL image has no region: the whole image is seen
        whole = generated(again, pixels(processor, None))
        assert np.array_equal(generated(again, noise_image(60, 40)), whole)
