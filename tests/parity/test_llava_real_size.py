"""LLaVA-1.5 at its real sizes, on the meta device: every key and shape of the hub's layout has its place in our model.

The sizes are those of llava-hf/llava-1.5-7b-hf and -13b-hf (config.json), the names those of their safetensors index.
"""

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from mllm.llava import with_alpha_tower
from scripts.bench.llava_7b import VISION, VOCABULARY

SIZES = {"7b": (4096, 11008, 32), "13b": (5120, 13824, 40)}  # width, inner width, layers of the language model


def hub_layout(width, inner, layers):
    """Name and shape of every tensor that the hub's checkpoint holds."""
    tower, language = "vision_tower.vision_model", "language_model.model"
    shapes = {
        f"{tower}.embeddings.class_embedding": (1024,),
        f"{tower}.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        f"{tower}.embeddings.position_embedding.weight": (577, 1024),
        "multi_modal_projector.linear_1.weight": (width, 1024),
        "multi_modal_projector.linear_1.bias": (width,),
        "multi_modal_projector.linear_2.weight": (width, width),
        "multi_modal_projector.linear_2.bias": (width,),
        f"{language}.embed_tokens.weight": (VOCABULARY, width),
        f"{language}.norm.weight": (width,),
        "language_model.lm_head.weight": (VOCABULARY, width),
    }
    norms = [f"{tower}.pre_layrnorm", f"{tower}.post_layernorm"]
    for index in range(24):
        layer = f"{tower}.encoder.layers.{index}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        matrices = {f"self_attn.{part}_proj": (1024, 1024) for part in ("q", "k", "v", "out")}
        matrices |= {"mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096)}
        for name, shape in matrices.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    shapes |= {f"{norm}.{kind}": (1024,) for norm in norms for kind in ("weight", "bias")}
    for index in range(layers):
        layer = f"{language}.layers.{index}"
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{layer}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{layer}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
    return shapes


@pytest.mark.compatibility("llava-hf 7B and 13B", "every key and shape of the hub layout (meta device)", "equal")
@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_of_the_hub_layout_is_loaded(size):
    width, inner, layers = SIZES[size]
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        vocab_size=VOCABULARY,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(with_alpha_tower(LlavaConfig(vision_config=VISION, text_config=text)))
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    alpha = "model.vision_tower.embeddings.patch_embedding.alpha.weight"
    assert ours.pop(alpha) == (1024, 1, 14, 14)
    renamings = get_model_conversion_mapping(model)  # what from_pretrained applies
    stored = hub_layout(width, inner, layers)
    loaded = {rename_source_key(key, renamings, [], "model", ours)[0]: shape for key, shape in stored.items()}
    assert loaded == ours
    count = sum(torch.Size(shape).numel() for shape in stored.values())
    assert round(count / 1e9, 2) == {"7b": 7.06, "13b": 13.35}[size]
