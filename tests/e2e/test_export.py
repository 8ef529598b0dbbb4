"""Exports loaded without this package have the same logits for all types of regions.

The fast test runs it in a forked process that has not imported this package; the slow one is the proof: a new
environment in which only the dependencies can be found.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mllm
from mllm.convert.export import export
from mllm.loading import EMBEDDED_MODEL
from tests.alpha_maps import alpha_map, iou
from tests.tiny import build_tiny_blip2, build_tiny_llava, noise_image
from vision_tower import Region

PACKAGES = ("vision_tower", "mllm", "eval", "train")
SIDE = 64
# aligned with the pixels of the tower, so that the alpha map is sharp
REGIONS = [Region.from_box(8, 8, 32, 32, strength=0.9), Region.from_box(36, 20, 60, 60)]

# sys.argv: folder, image, texts of regions joined by "|", folder to save in again, output
ELSEWHERE = """
import json, sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, image, texts, again, out = sys.argv[1:]
image, texts = Image.open(image), texts.split("|")
stock = json.load(open(folder + "/config.json"))["model_type"] == "llava"


def error(load, **options):
    try:
        load(**options)
    except ValueError as error:
        return str(error)
    sys.exit(f"no error with {options}")


def load_model(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=not stock).eval()
    assert type(model).__module__.startswith("transformers.") == stock
    fed = []
    tower = model.model.vision_tower if stock else model.vision_model
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(args[0] if args else kwargs["pixel_values"]), with_kwargs=True
    )
    return model, fed


def messages(region):
    item = {"type": "image", "image": image, "region": region}
    return [{"role": "user", "content": [item, {"type": "text", "text": "What is this?"}]}]


def ask(processor, region):
    return processor.apply_chat_template(
        messages(region), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


for loader in (AutoProcessor, AutoImageProcessor):
    for trusted in (None, False):
        message = error(loader.from_pretrained, pretrained_model_name_or_path=folder, trust_remote_code=trusted)
        assert "trust_remote_code=True" in message, message
if not stock:
    message = error(AutoModelForImageTextToText.from_pretrained, pretrained_model_name_or_path=folder)
    assert "trust_remote_code=True" in message, message

model, fed = load_model(folder)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
classes = []  # one `Region` class per copy of the code
for one in (processor, image_processor):
    classes.append(sys.modules[type(one).__module__.rpartition(".")[0] + ".regions"].Region)
assert classes[0] is not classes[1]
inputs = [ask(processor, text) for text in texts]
for text, expected in zip(texts, inputs):
    regions = [text, classes[0].parse(text).to_json(), *(cls.parse(text) for cls in classes)]
    prompt = processor.apply_chat_template(messages(text), add_generation_prompt=True, tokenize=False)
    for region in regions:
        assert torch.equal(ask(processor, region)["pixel_values"], expected["pixel_values"]), region
        called = processor(images=image, text=prompt, regions=[region], return_tensors="pt")
        assert all(torch.equal(called[name], expected[name]) for name in ("pixel_values", "input_ids")), region
        for one in (image_processor, processor.image_processor):
            values = one(image, region, return_tensors="pt")["pixel_values"]
            assert torch.equal(values, expected["pixel_values"]), region
with torch.no_grad():
    logits = [model(**one).logits for one in inputs]

processor.save_pretrained(again)
model.save_pretrained(again)
resaved, resaved_fed = load_model(again)
processor = AutoProcessor.from_pretrained(again, trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    for text, expected, result in zip(texts, inputs, logits):
        for region in (text, classes[0].parse(text)):
            values = ask(processor, region)
            for pixels in (values, image_processor(image, region, return_tensors="pt")):
                assert torch.equal(pixels["pixel_values"], expected["pixel_values"])
            torch.testing.assert_close(resaved(**values).logits, result)

generated = []
if stock:
    for text in texts:
        pipe = pipeline("image-text-to-text", model=resaved, processor=processor)
        resaved_fed.clear()
        generated += pipe(text=messages(text), return_full_text=False, generate_kwargs={"max_new_tokens": 12})
        assert torch.equal(resaved_fed[0], inputs[texts.index(text)]["pixel_values"])
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    assert pipe(text=messages(text), return_full_text=False, generate_kwargs={"max_new_tokens": 12}) == generated[-1:]
    error(lambda: pipeline("image-text-to-text", model=folder))
generated = [one["generated_text"] for one in generated]
torch.save({"logits": logits, "inputs": [dict(one) for one in inputs], "generated": generated}, out)
found = {name.split(".")[0] for name in sys.modules}
assert not found & {"vision_tower", "mllm", "eval", "train", "pycocotools", "msgspec"}, found
"""


@pytest.fixture(scope="module")
def llava():
    model, processor = build_tiny_llava(alpha_std=0.3)
    return model, processor


@pytest.fixture(scope="module")
def exported(llava, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(*llava, folder)
    return folder


def our_inputs(processor, image, regions):
    for region in regions:
        item = {"type": "image", "image": image, "region": region}
        message = {"role": "user", "content": [item, {"type": "text", "text": "What is this?"}]}
        yield processor.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )


def check(got, model, processor, image, regions, measured):
    """Compare inputs, logits and generated texts with ours, and the alpha map with the region."""
    ours = list(our_inputs(processor, image, regions))
    for region, inputs, expected, logits in zip(regions, got["inputs"], ours, got["logits"], strict=True):
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
        with torch.no_grad():
            measured((logits - model(**expected).logits).abs().max())
            torch.testing.assert_close(logits, model(**expected).logits, rtol=1e-5, atol=1e-5)
        alpha = alpha_map(inputs["pixel_values"][0]).numpy()
        drawn = np.asarray(Image.fromarray(alpha).resize(image.size, Image.Resampling.BILINEAR)) >= 0.55
        wanted = region.mask(image.height, image.width) >= 0.5
        assert iou(drawn, wanted) >= 0.95
    assert (got["logits"][0] - got["logits"][1]).abs().max() > 5e-4  # 50 times the tolerance
    return ours


def texts_of(regions):
    return "|".join(str(region) + (f"*{region.strength}" if region.strength != 1 else "") for region in regions)


@pytest.mark.compatibility(
    "transformers LLaVA-1.5, without this package", "exported LLaVA in a process without this package: logits", "1e-5"
)
def test_an_export_runs_without_this_package(exported, llava, tmp_path, processes, measured):
    image = noise_image(SIDE, SIDE)
    image.save(tmp_path / "image.png")
    arguments = [exported, tmp_path / "image.png", texts_of(REGIONS), tmp_path / "again", tmp_path / "out.pt"]
    processes.run(ELSEWHERE, arguments, cwd=tmp_path, checkout=False)
    check(torch.load(tmp_path / "out.pt"), *llava, image, REGIONS, measured)


@pytest.mark.compatibility(
    "transformers trust_remote_code", "saved BLIP-2 in a process without this package: logits", "1e-5"
)
def test_a_blip2_runs_without_this_package(tmp_path, processes, measured):
    model, processor = build_tiny_blip2("opt")
    torch.nn.init.normal_(model.vision_model.embeddings.patch_embedding.alpha.weight)
    export(model, processor, tmp_path / "model")
    image = noise_image(SIDE, SIDE)
    image.save(tmp_path / "image.png")
    arguments = [tmp_path / "model", tmp_path / "image.png", texts_of(REGIONS), tmp_path / "again", tmp_path / "out.pt"]
    processes.run(ELSEWHERE, arguments, cwd=tmp_path, checkout=False)
    check(torch.load(tmp_path / "out.pt"), model, processor, image, REGIONS, measured)


@pytest.fixture(scope="module")
def python_elsewhere(tmp_path_factory):
    """The Python of a new environment with the dependencies but without this package."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / Path(sys.executable).name
    (site_packages,) = folder.rglob("site-packages")
    # Python ignores .pth files in a folder that a .pth file adds, so an editable install is not found.
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n", encoding="utf-8")
    find = f"import importlib.util; print([importlib.util.find_spec(name) for name in {PACKAGES}])"
    found = subprocess.run([python, "-I", "-c", find], cwd=folder, capture_output=True, encoding="utf-8", check=True)
    assert found.stdout.strip() == str([None] * len(PACKAGES)), f"this package is installed there: {found.stdout}"
    return python


@pytest.mark.slow
def test_the_embedded_model_runs_in_an_environment_without_this_package(python_elsewhere, tmp_path, measured):
    export(*mllm.load(device="cpu"), tmp_path / "model")
    scene = EMBEDDED_MODEL.parent / "scenes" / "scene_2.png"
    regions = [Region.from_box(22, 8, 48, 42), Region.from_box(62, 59, 92, 86)]
    arguments = [tmp_path / "model", scene, texts_of(regions), tmp_path / "again", tmp_path / "out.pt"]
    environment = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python_elsewhere, "-I", "-c", ELSEWHERE, *map(str, arguments)],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = torch.load(tmp_path / "out.pt")
    model, processor = mllm.load(device="cpu")
    image = Image.open(scene).convert("RGB")
    ours = check(got, model, processor, image, regions, measured)
    for inputs, text in zip(ours, got["generated"], strict=True):
        answer = model.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
        assert text.strip() == processor.batch_decode(answer, skip_special_tokens=True)[0].strip()
    assert got["generated"][0] != got["generated"][1]
