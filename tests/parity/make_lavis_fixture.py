"""Write data/lavis_blip2.safetensors: a random BLIP-2 in the layout of LAVIS and the outputs of its modules.

    python -m tests.parity.make_lavis_fixture LAVIS_CHECKOUT    (needs transformers 4.33.2, which LAVIS requires)

The reference is salesforce/LAVIS at 506965b, in float32: `VisionTransformer` and `LayerNorm` of
lavis/models/clip_vit.py (blip2.py has the same `LayerNorm`) and `BertLMHeadModel` of
lavis/models/blip2_models/Qformer.py. The tower has the weights of alpha_clip_original.safetensors. Two runs:

- "plain": the tower of LAVIS with both blocks, three channels;
- "alpha": the output of the first of two blocks of Alpha-CLIP, because LAVIS drops the last block of CLIP.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

DATA = Path(__file__).parent / "data"
ROWS, QUERIES, WIDTH, LANGUAGE_WIDTH = 2, 5, 64, 64


def main(checkout: str) -> None:
    """Run the modules of LAVIS on random weights and save weights and outputs."""
    models = Path(checkout) / "lavis" / "models"
    original = load_file(DATA / "alpha_clip_original.safetensors")
    torch.manual_seed(7)
    model, stage_1_only = build(load(models / "clip_vit.py"), load(models / "blip2_models" / "Qformer.py"))
    for name, parameter in model.named_parameters():  # no values of one or zero, so that a dropped tensor is detected
        noise = 0.5 if name == "query_tokens" else 0.05
        parameter.data = (parameter + noise * torch.randn_like(parameter)).half().float()
    model.visual_encoder.load_state_dict(tower_weights(original))
    outputs = {}
    with torch.no_grad():
        seen = model.visual_encoder(original["input.image"][:ROWS])
        outputs |= {"plain.tower": seen, **run(model, "plain", seen)}
        outputs |= run(model, "alpha", original["output.hidden_states.1"][:ROWS])
    content = {f"output.{name}": tensor for name, tensor in outputs.items()}
    for name, tensor in model.state_dict().items():
        if not name.startswith("visual_encoder."):
            content[f"checkpoint.{name}"] = tensor.half() if tensor.is_floating_point() else tensor
    content = {name: tensor.contiguous() for name, tensor in content.items()}
    save_file(content, DATA / "lavis_blip2.safetensors", metadata={"stage_1_only": json.dumps(stage_1_only)})


def load(file: Path) -> types.ModuleType:
    """Import one file of LAVIS, with empty modules for the imports that are not called (downloads, checkpointing)."""
    for name, attribute in (
        ("fairscale.nn.checkpoint.checkpoint_activations", "checkpoint_wrapper"),
        ("lavis.models.eva_vit", "convert_weights_to_fp16"),
        ("lavis.common.dist_utils", "download_cached_file"),
    ):
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], attribute, None)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(clip_vit: types.ModuleType, qformer: types.ModuleType) -> tuple[nn.Module, list[str]]:
    """The modules of stage 2 under the names of LAVIS, and the names that only stage 1 has."""
    config = qformer.BertConfig(
        vocab_size=30,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=1,
        intermediate_size=96,
        max_position_embeddings=16,
    )
    tower = clip_vit.VisionTransformer(32, 8, 128, layers=2, heads=2, use_grad_checkpointing=False)
    config.encoder_width, config.query_length = tower.num_features, QUERIES
    config.add_cross_attention, config.cross_attention_freq = True, 2
    model = nn.Module()
    model.visual_encoder, model.ln_vision = tower, clip_vit.LayerNorm(tower.num_features)
    model.Qformer, model.query_tokens = qformer.BertLMHeadModel(config), nn.Parameter(torch.zeros(1, QUERIES, WIDTH))
    # Source: `Blip2Qformer.__init__`, then `Blip2T5.__init__`
    model.vision_proj, model.text_proj = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
    model.itm_head, model.temp = nn.Linear(WIDTH, 2), nn.Parameter(torch.ones([]))
    stage_1 = set(model.state_dict())
    del model.vision_proj, model.text_proj, model.itm_head, model.temp
    model.Qformer.cls = None
    model.Qformer.bert.embeddings.word_embeddings = model.Qformer.bert.embeddings.position_embeddings = None
    for layer in model.Qformer.bert.encoder.layer:
        layer.output = layer.intermediate = None
    model.t5_proj = nn.Linear(WIDTH, LANGUAGE_WIDTH)
    return model.eval(), sorted(stage_1 - set(model.state_dict()))


def tower_weights(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Alpha-CLIP's weights in the layout of LAVIS' tower: no alpha, and nothing after the blocks."""
    kept = {}
    for key, tensor in original.items():
        name = key.removeprefix("checkpoint.").replace("attn.in_proj.", "attn.in_proj_")
        if key.startswith("checkpoint.") and not name.startswith(("conv1_alpha.", "ln_post.")) and name != "proj":
            kept[name] = tensor.float()
    return kept


def run(model: nn.Module, name: str, seen: torch.Tensor) -> dict[str, torch.Tensor]:
    """The forward pass after the tower, as in `Blip2T5.forward`: `seen` is (B, 1 + P, D)."""
    embeds = model.ln_vision(seen)
    output = model.Qformer.bert(
        query_embeds=model.query_tokens.expand(len(seen), -1, -1),
        encoder_hidden_states=embeds,
        encoder_attention_mask=torch.ones(embeds.shape[:-1], dtype=torch.long),
        output_hidden_states=True,
        return_dict=True,
    )
    outputs = {f"{name}.ln_vision": embeds, f"{name}.projected": model.t5_proj(output.last_hidden_state)}
    return outputs | {f"{name}.qformer.{number}": states for number, states in enumerate(output.hidden_states)}


if __name__ == "__main__":
    main(sys.argv[1])
