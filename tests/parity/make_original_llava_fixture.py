"""Write data/original_llava.safetensors: a tiny LLaVA in the original code base with our tower in it, and its logits.

    PYTHONPATH=LLAVA_CHECKOUT python -m tests.parity.make_original_llava_fixture

The judge is the model code of haotian-liu/LLaVA at c121f04: its builder, `encode_images`, projector, the splicing of
image features into the text, and its language model. A fused directory runs there too, in its own unchanged
`CLIPVisionTower`; how far apart the two are is printed.
"""

import tempfile
from pathlib import Path

import llava.model.multimodal_encoder.builder as builder
import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.tiny import noise_image, tiny_vision_config
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPVisionConfig, AlphaCLIPVisionModel, Region
from vision_tower.conversion import fuse
from vision_tower.llava_tower import AlphaCLIPVisionTower

FIXTURE = Path(__file__).parent / "data" / "original_llava.safetensors"
IDS = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 9, 12, 7], [1, 6, IMAGE_TOKEN_INDEX, 9, 3, 8]])
REGIONS = [Region.from_box(0, 0, 30, 40), Region.from_box(30, 0, 60, 40)]
STOCK_TOWER = builder.CLIPVisionTower


def main() -> None:
    """Run the original code on random weights and keep weights, inputs and outputs."""
    with tempfile.TemporaryDirectory() as folder:
        ours, fused = write_towers(Path(folder))
        processor = AlphaCLIPImageProcessor.from_pretrained(ours)
        images = processor([noise_image(60, 40)] * 2, REGIONS, return_tensors="pt")["pixel_values"]
        builder.CLIPVisionTower = AlphaCLIPVisionTower
        model = build(ours)
        with torch.no_grad():
            features = model.encode_images(images)
            logits = model(input_ids=IDS, images=images).logits
            listed = model(input_ids=IDS, images=list(images)).logits
        builder.CLIPVisionTower = STOCK_TOWER
        stock = build(fused, model)
        with torch.no_grad():
            apart = (stock(input_ids=IDS, images=images).logits - logits).abs().max()
    print(f"fused directory in the unchanged CLIPVisionTower: logits {apart:.1e} apart")
    print(f"images as a list: logits {(listed - logits).abs().max():.1e} apart")
    content = {f"weights.{key}": tensor for key, tensor in model.state_dict().items()}
    content |= {"input.ids": IDS, "input.images": images, "output.features": features, "output.logits": logits}
    save_file({key: tensor.contiguous() for key, tensor in content.items()}, FIXTURE)


def write_towers(folder: Path) -> tuple[str, str]:
    """A random tower of ours, and the same fused."""
    torch.manual_seed(7)
    tower = AlphaCLIPVisionModel(AlphaCLIPVisionConfig(**tiny_vision_config(initializer_range=0.2)))
    torch.nn.init.normal_(tower.embeddings.patch_embedding.alpha.weight, std=0.3)
    fields = {key: value for key, value in tower.config.to_dict().items() if key not in ("model_type", "auto_map")}
    fused = CLIPVisionModel(CLIPVisionConfig(**{**fields, "num_channels": 4}))
    fused.load_state_dict(fuse(tower.state_dict()))
    processor = AlphaCLIPImageProcessor.for_size(32, "pad")
    for name, model in (("ours", tower), ("fused", fused)):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return str(folder / "ours"), str(folder / "fused")


def build(tower: str, like: torch.nn.Module | None = None) -> LlavaLlamaForCausalLM:
    """A tiny LLaVA of the original code, with the weights of `like` outside its tower."""
    config = LlavaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
        mm_vision_tower=tower,
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=32,
        image_aspect_ratio="pad",
        tokenizer_model_max_length=64,
        attn_implementation="eager",
    )
    torch.manual_seed(8)
    model = LlavaLlamaForCausalLM(config).eval()
    model.get_vision_tower().load_model()
    if like is not None:
        own = {key: tensor for key, tensor in like.state_dict().items() if "vision_tower" not in key}
        model.load_state_dict(own, strict=False)
    return model


if __name__ == "__main__":
    main()
