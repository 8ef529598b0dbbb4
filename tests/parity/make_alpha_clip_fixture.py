"""Write data/alpha_clip_original.safetensors: a random checkpoint and the outputs of the original code.

    python -m tests.parity.make_alpha_clip_fixture ALPHA_CLIP_CHECKOUT    (needs loralib, which the original imports)

The reference is alpha_clip/model.py of SunzeY/AlphaCLIP at e5676c9, run in float32 on a checkpoint of float16 values.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

FIXTURE = Path(__file__).parent / "data" / "alpha_clip_original.safetensors"


def main(checkout: str) -> None:
    """Run the original tower on random weights and save weights, inputs and outputs."""
    spec = importlib.util.spec_from_file_location("original", Path(checkout) / "alpha_clip" / "model.py")
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    torch.manual_seed(5)
    tower = original.VisionTransformer(input_resolution=32, patch_size=8, width=128, layers=2, heads=2, output_dim=48)
    for parameter in tower.parameters():  # no values of one or zero, so that a dropped or swapped tensor is detected
        parameter.data = (parameter + 0.05 * torch.randn_like(parameter)).half().float()
    blocks = []
    for block in tower.transformer.resblocks:
        block.register_forward_hook(lambda _module, _inputs, output: blocks.append(output.permute(1, 0, 2)))
    image, alpha = torch.randn(3, 3, 32, 32), torch.rand(3, 1, 32, 32).round()
    with torch.no_grad():
        features = tower(image, (alpha - 0.5) / 0.26)
    content = {f"checkpoint.{key}": tensor.half() for key, tensor in tower.state_dict().items()}
    content |= {f"output.hidden_states.{number}": states for number, states in enumerate(blocks, 1)}
    content |= {"input.image": image, "input.alpha01": alpha, "output.features": features}
    save_file({key: tensor.contiguous() for key, tensor in content.items()}, FIXTURE)


if __name__ == "__main__":
    main(sys.argv[1])
