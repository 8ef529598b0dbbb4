"""Tiny random models and pictures that the tests share; nothing is downloaded."""

import numpy as np
from PIL import Image
from transformers import CLIPConfig


def tiny_vision_config(**changes):
    """Fields of a 3-layer tower: 32 pixels, patch 8, width 32."""
    fields = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 16,
    }
    return {**fields, **changes}


def tiny_clip_config():
    """A full CLIP of that tower and a 2-layer text tower."""
    text = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    return CLIPConfig(text_config=text, vision_config=tiny_vision_config(), projection_dim=16)


def noise_picture(width, height, seed=0):
    """An RGB picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
