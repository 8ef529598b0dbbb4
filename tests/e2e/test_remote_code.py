"""The saved tower loads with `trust_remote_code` in a process without this package and pycocotools."""

import pytest
import torch

from tests.alpha_maps import alpha_map
from tests.tiny import build_tiny_tower, noise_image, save_model
from vision_tower import AlphaCLIPImageProcessor, Region

CODE = """
import sys
import importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("vision_tower", "mllm", "pycocotools"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
for loader in (AutoModel, AutoImageProcessor, AutoProcessor):
    try:
        sys.exit(f"no error: {loader.from_pretrained(sys.argv[1])}")
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
image, texts = Image.open(sys.argv[2]), ["box:4,4,40,30*0.3", "box:44,4,60,50"]
values = processor(image, texts, return_tensors="pt")
copy = get_class_from_dynamic_module("regions.Region", sys.argv[1])
assert copy is not sys.modules[type(processor).__module__.rpartition(".")[0] + ".regions"].Region
regions = [copy.parse(text) for text in texts]
again = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
for one in (processor, again):
    for given in (regions, [region.to_json() for region in regions]):
        assert torch.equal(one(image, given, return_tensors="pt")["pixel_values"], values["pixel_values"])
pooled = model(**values).pooler_output.detach()
torch.save({"pixels": values["pixel_values"], "pooled": pooled}, sys.argv[3])
assert "vision_tower" not in sys.modules
"""


@pytest.mark.compatibility(
    "transformers trust_remote_code", "tower and image processor in a process without this package", "equal"
)
def test_tower_and_image_processor_load_elsewhere(tmp_path, processes):
    model = build_tiny_tower()
    processor = AlphaCLIPImageProcessor.for_size(32, "pad")
    folder = tmp_path / "tower"
    save_model(folder, model, processor)
    picture = noise_image(70, 50)
    picture.save(tmp_path / "p.png")
    processes.run(CODE, [folder, tmp_path / "p.png", tmp_path / "out.pt"], cwd=tmp_path, checkout=False)
    got = torch.load(tmp_path / "out.pt")
    regions = [Region.from_box(4, 4, 40, 30, strength=0.3), Region.from_box(44, 4, 60, 50)]
    expected = processor(picture, regions, return_tensors="pt")
    assert torch.equal(got["pixels"], expected["pixel_values"])
    assert torch.equal(got["pooled"], model(**expected).pooler_output)
    assert not torch.equal(got["pooled"][0], got["pooled"][1])
    least = alpha_map(got["pixels"]).amin((1, 2))
    torch.testing.assert_close(least, torch.tensor([1 - 0.3, 0.0]))
