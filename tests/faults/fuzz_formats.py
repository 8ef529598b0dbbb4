"""The formats that are fuzzed: how a case is made, and what reads it. Each reader gets a folder of its own, in which
`prepare` has put the other files that it needs.
"""

import dataclasses
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save

from eval.external_formats import read_references
from eval.predictions import read_predictions
from mllm.adapter_files import read_adapter_config
from mllm.data.index import RegionIndex
from mllm.data.index_writer import write_index
from mllm.data.readers import coco, grit, jsonl, mask_imagenet, refcocog, visual_genome
from mllm.data.samples import RegionSample, load_image
from mllm.region_chat.batch import read_requests
from tests.files import encoded_image
from tests.fuzzing import HOSTILE, byte_cases, hostile_records, json_cases, pickle_cases
from tests.tiny import noise_image
from train.contrastive import arguments
from train.tuning.arguments import parse_args
from vision_tower import AlphaCLIPImageProcessor, Region, conversion

RLE = {"size": [8, 10], "counts": [12, 3, 5, 3, 57]}
COMPRESSED = {"size": [8, 10], "counts": "<352i1"}
META = {"id": "a", "image": "p.png", "question": "What?"}
WEIGHTS = Path(__file__).parents[1] / "parity" / "data" / "alpha_clip_original.safetensors"


@dataclasses.dataclass(frozen=True)
class Format:
    """How to generate and read the cases of a format.

    Attributes:
        cases: Strategy of the bytes of a file.
        read: Reads a case: (folder, bytes).
        prepare: Writes what else lies in the folder, once.
        share: Of the number of cases that a run asks for; below 1 for slow readers, in the short run alone.
    """

    cases: st.SearchStrategy[bytes]
    read: Callable[[Path, bytes], object]
    prepare: Callable[[Path], object] = lambda folder: None
    share: float = 1.0


def in_file(name, read):
    """A reader that reads a folder in which the case is one file."""

    def read_case(folder, content):
        (folder / name).write_bytes(content)
        result = read(folder)
        return list(result) if hasattr(result, "__next__") else result

    return read_case


def writing(**files):
    def prepare(folder):
        noise_image(10, 8).save(folder / "p.png")
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))

    return prepare


IMAGE_DATA = [
    {"image_id": 1, "width": 10, "height": 8, "url": "https://x/VG_100K/1.jpg", "coco_id": None},
    {"image_id": 2, "width": 20, "height": 18, "url": "https://x/VG_100K_2/2.jpg", "flickr_id": 5},
]
BOXES = {"x": 1, "y": 2, "width": 3, "height": 4}
REGIONS = [
    {"id": 1, "regions": [{"region_id": 7, "image_id": 1, "phrase": "a cat", **BOXES}]},
    {"id": 2, "regions": [{"region_id": 8, "image_id": 2, "phrase": "a dog", **BOXES}]},
]
QUESTIONS = [
    {"id": 1, "qas": [{"qa_id": 3, "image_id": 1, "question": "What?", "answer": "A cat.", "a_objects": []}]},
    {"id": 2, "qas": [{"qa_id": 4, "image_id": 2, "question": "Where?", "answer": "There.", "type": "where"}]},
]
MAPPING, MASKS = {"3": 7}, {"7": RLE, "8": {**COMPRESSED, "size": [18, 20]}}
GENOME = writing(
    image_data=IMAGE_DATA,
    region_descriptions=REGIONS,
    question_answers=QUESTIONS,
    qa_to_region_mapping=MAPPING,
    region_masks=MASKS,
)
REFS = [
    {"ref_id": 1, "ann_id": 5, "image_id": 1, "split": "val", "category_id": 2, "file_name": "p_5.png"}
    | {"sentences": [{"sent_id": 9, "sent": "the cat", "raw": "The cat", "tokens": ["the", "cat"]}], "sent_ids": [9]}
]
INSTANCES = {
    "images": [{"id": 1, "width": 10, "height": 8, "file_name": "p.png"}],
    "annotations": [
        {"id": 5, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
        | {"segmentation": [[1, 2, 4, 2, 4, 6]]},
        {"id": 6, "image_id": 1, "category_id": 2, "bbox": [0, 0, 3.5, 4], "segmentation": RLE},
    ],
}


def refs(folder):
    writing(instances=INSTANCES)(folder)
    (folder / "refs(umd).p").write_bytes(pickle.dumps(REFS, 2))


CAPTIONS = {
    "images": [{"id": 1, "original_id": 3, "width": 10, "height": 8, "file_name": "p.png", "caption": "a cat"}],
    "annotations": [
        {"id": 5, "image_id": 1, "original_id": 7, "bbox": [1, 2, 3, 4], "caption": "it", "segmentation": RLE},
        {"id": 6, "image_id": 1, "original_id": 7, "bbox": [1, 2, 3, 4], "segmentation": [1, 2, 4, 2, 4, 6]},
    ],
}
GRIT = {
    "caption": "a cat and a dog",
    "ref_exps": [[0, 5, 0.1, 0.1, 0.5, 0.5, 0.9], [10, 15, 0.5, 0, 1, 1, 0.8]],
    "pseudo_masks": [RLE, None],
    "width": 10,
    "height": 8,
}


def tar(**members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def exif(turned):
    tags = Image.Exif()
    tags[0x0112] = turned
    return tags.tobytes()


PICTURE = noise_image(10, 8)
IMAGES = {
    "png": encoded_image(PICTURE, "PNG", exif=exif(6)),
    "grey": encoded_image(Image.fromarray(np.arange(80, dtype=np.uint16).reshape(8, 10) * 800), "PNG"),
    "palette": encoded_image(PICTURE.convert("P"), "PNG", transparency=3),
    "jpeg": encoded_image(PICTURE, "JPEG", exif=exif(3)),
    "cmyk": encoded_image(PICTURE.convert("CMYK"), "JPEG"),
    "gif": encoded_image(PICTURE.convert("P"), "GIF", save_all=True, append_images=[PICTURE.convert("P")]),
    "bmp": encoded_image(PICTURE, "BMP"),
    "tiff": encoded_image(PICTURE, "TIFF", compression="tiff_lzw"),
    "float": encoded_image(Image.fromarray(np.linspace(0, 1, 80, dtype=np.float32).reshape(8, 10)), "TIFF"),
    "webp": encoded_image(PICTURE, "WEBP"),
    "ppm": encoded_image(PICTURE, "PPM"),
    "tga": encoded_image(PICTURE, "TGA"),
    "ico": encoded_image(PICTURE, "ICO"),
    "jpeg2000": encoded_image(PICTURE, "JPEG2000"),
}
MASK = Image.fromarray((np.arange(80).reshape(8, 10) % 3 == 0).astype(np.uint8) * 255)

JSONL = [
    {**META, "region": {"box": [1, 2, 5, 6]}, "answer": "a cat", "meta": {"area": 0.1}},
    {"image": "p.png", "region": {"rle": RLE}, "references": ["a", "b"]},
]
REQUESTS = [{**META, "region": {"box": [1, 2, 5, 6]}}, {"id": 2, "image": "p.png", "region": {"whole": True}}]
PREDICTIONS = [
    {"id": "1", "prediction": "a cat", "references": ["a cat"], "question": "What?", "meta": {"area": 0.1}},
    {"id": "2", "prediction": "a dog", "references": ["it"], "image": "p.png", "region": {"box": [1, 2, 3, 4]}},
]
COCO_REFERENCES = {
    "images": [{"id": 1}, {"id": 2}],
    "annotations": [{"id": 5, "image_id": 1, "caption": "a"}, {"id": 6, "image_id": 2, "caption": "b"}],
}
MDETR = {"images": [{"id": 1, "caption": "a cat"}], "annotations": [{"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4]}]}
REGIONS_JSON = [
    {"box": [1, 2, 5, 6], "strength": 0.5},
    {"nbox": [0.1, 0.2, 0.5, 0.6]},
    {"polygon": [[[1, 2], [5, 2], [5, 6]], [[6, 6], [8, 6], [8, 8]]]},
    {"polygon": [1, 2, 5, 2, 5, 6]},
    {"rle": RLE},
    {"rle": COMPRESSED},
    {"points": [[1, 2], [3, 4]], "radius": 2},
    {"stroke": [[1, 2], [3, 4]], "width": 2},
    {"whole": True},
]
REGION_TEXTS = [
    b"box:1,2,5,6*0.5",
    b"nbox:0.1,0.2,0.5,0.6",
    b"polygon:1,2,5,2,5,6;6,6,8,6,8,8",
    b"points:1,2;3,4@2",
    b"stroke:1,2;3,4@2",
    b"whole",
    b'rle:{"size": [8, 10], "counts": [12, 3, 5, 3, 57]}',
]
RECIPE = {
    "model": "M",
    "data": ["D"],
    "output_dir": "O",
    "use_cpu": True,
    "learning_rate": 2e-4,
    "num_train_epochs": 1,
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "lora_r": 8,
    "lora_dropout": 0.05,
    "lora_targets": ["q_proj"],
    "train_parts": ["multi_modal_projector", "alpha"],
    "learning_rates": ["alpha=1e-4"],
    "turn_weights": ["description=3"],
    "region_input": "mixed",
    "mask_share": 0.5,
    "box_jitter": 0.1,
    "eval_metrics": ["exact match"],
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "eval_strategy": "no",
    "save_total_limit": 2,
    "seed": 1,
}
CONTRASTIVE = {
    **{key: RECIPE[key] for key in ("model", "data", "output_dir", "use_cpu", "learning_rate", "max_steps", "seed")},
    "train_parts": ["alpha"],
    "geometry": "pad",
    "train_blocks": None,
    "logit_scale": 100.0,
    "loss": "symmetric",
    "whole_image_rate": 0.1,
    "mask_jitter": 2,
    "max_blur": 0.1,
    "cache_chunk": 4,
}


def yaml_cases(valid):
    records = hostile_records(valid).map(
        lambda value: yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    )
    more = [b"model: *a", b"a: &a [*a]", b"model: !!python/object:os.system x", b"? [a]\n: b", b"model: 2001-01-01"]
    more += [b"- a\n- b", b"model: 1_000", b"1: 2", b"null: 1", b"a: b: c", b"\tmodel: M", b"<<: 3", b"model: 0o9"]
    nested = b"a: " + b"[" * 3000
    laughs = b"a: &a [x,x]\n" + b"".join(b"%c: &%c [*%c,*%c]\n" % (n, n, n - 1, n - 1) for n in range(98, 122))
    return st.one_of(
        records, records, byte_cases(yaml.safe_dump(valid).encode()), st.sampled_from([*more, nested, laughs])
    )


def read_recipe(parse):
    return in_file("recipe.yaml", lambda folder: parse([str(folder / "recipe.yaml")]))


DEEPSPEED = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def read_deepspeed(folder):
    flags = ["--model", "M", "--data", "D", "--output_dir", "O", "--use_cpu", "true"]
    return parse_args([*flags, "--deepspeed", str(folder / "ds.json"), "--learning_rates", "alpha=1e-4"])


ARRAYS = {"dtype": "uint8", "shape": [8, 10, 3], "value": 7, "region": {"box": [1, 2, 5, 6]}, "geometry": "pad"}


def read_array(_, content):
    """An array of a stated type and shape; what is no such thing goes to the processor as it is."""
    wanted = parsed(content)
    if not isinstance(wanted, dict):
        return AlphaCLIPImageProcessor.for_size(16, "pad")(wanted, Region.whole())
    array, region = wanted.get("image"), wanted.get("region")
    shape = wanted.get("shape")
    small = isinstance(shape, list) and all(type(side) is int and 0 <= side < 1000 for side in shape)
    if small and np.prod(shape, dtype=float) < 1e6 and wanted.get("dtype") in TYPES:
        array = np.zeros(shape, wanted["dtype"])
        if isinstance(wanted.get("value"), bool | int | float):
            with np.errstate(all="ignore"):
                array += np.asarray(wanted["value"], "float64").astype(wanted["dtype"])
    if isinstance(region, dict):
        region = Region.from_json(region)
    return AlphaCLIPImageProcessor.for_size(16, "pad")(array, region, return_tensors="pt")


TYPES = ["uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64", "complex64"]


@st.composite
def array_cases(draw):
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 10, 17]), max_size=5)
    case = {**ARRAYS, "dtype": draw(st.sampled_from(TYPES)), "shape": draw(st.one_of(st.just([8, 10, 3]), shapes))}
    case["value"] = draw(st.sampled_from([0, 1, 255, 256, -1, 0.5, 70000, float("nan"), float("inf"), 1e300]))
    if draw(st.booleans()):
        case["region"] = draw(
            st.one_of(
                st.sampled_from(HOSTILE),
                hostile_records(REGIONS_JSON).map(lambda v: v[0] if isinstance(v, list) and v else v),
            )
        )
    if draw(st.integers(0, 3)) == 0:
        case |= {"shape": None, "image": draw(st.sampled_from(HOSTILE))}
    return json.dumps(case).encode()


def parsed(content):
    """Parsed JSON, as callers pass it."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_region(_, content):
    region = Region.from_json(parsed(content))
    return use(region)


def use(region):
    str(region), region.to_json(), hash(region)
    return region.mask(8, 10), region.bounding_box(8, 10)


def tensors():
    content = load_file(WEIGHTS)
    return {key.removeprefix("checkpoint."): t for key, t in content.items() if key.startswith("checkpoint.")}


def pth():
    file = io.BytesIO()
    torch.save(tensors(), file)
    return file.getvalue()


@st.composite
def pickles_in_archives(draw):
    """A damaged pickle in an archive with correct checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(PTH)) as whole, zipfile.ZipFile(file, "w") as archive:
        for name in whole.namelist():
            content = whole.read(name)
            archive.writestr(name, draw(byte_cases(content)) if name.endswith("data.pkl") else content)
    return file.getvalue()


@st.composite
def headers(draw):
    """A malformed header before correct tensors."""
    length = int.from_bytes(SAFETENSORS[:8], "little")
    header = draw(json_cases(json.loads(SAFETENSORS[8 : 8 + length])))
    return len(header).to_bytes(8, "little") + header + SAFETENSORS[8 + length :]


PTH, SAFETENSORS = pth(), save(tensors())
ADAPTER = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": "x",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "target_modules": r".*language_model.*\.(q_proj|v_proj)",
    "modules_to_save": ["patch_embedding.alpha"],
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {"q_proj": 3},
    "use_rslora": False,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "megatron_config": None,
}


def index(folder):
    noise_image(10, 8).save(folder / "p.png")
    meta = {"image_id": 1, "region_id": 2, "width": 10, "height": 8}
    sample = RegionSample("1/2", str(folder / "p.png"), (Region.from_box(1, 2, 3, 4),), None, ("a cat",), meta=meta)
    write_index(folder / "region_index", folder, [("train", sample)], layout="a test")


def read_index(folder):
    opened = RegionIndex(folder)
    return opened.read(opened.rows("train")), opened.missing_images("train")


INDEX = {
    "format": 3,
    "layout": "a test",
    "root": "..",
    "turns_without_region": 0,
    "images": 1,
    "regions": 1,
    "splits": {"train": 1},
    "skipped": [],
}


MASK_ENTRIES = [[0, 1, "p.png", RLE, [1, 2, 3, 4], 0, "a cat"], [0, 1, "p.png", COMPRESSED, [1, 2, 3, 4], 0, "a dog"]]

FORMATS = {
    "vg_image_data": Format(json_cases(IMAGE_DATA), in_file("image_data.json", visual_genome.read_regions), GENOME),
    "vg_regions": Format(json_cases(REGIONS), in_file("region_descriptions.json", visual_genome.read_regions), GENOME),
    "vg_questions": Format(
        json_cases(QUESTIONS), in_file("question_answers.json", visual_genome.read_region_questions), GENOME
    ),
    "vg_mapping": Format(
        json_cases(MAPPING), in_file("qa_to_region_mapping.json", visual_genome.read_image_questions), GENOME
    ),
    "vg_masks": Format(
        json_cases(MASKS),
        in_file("region_masks.json", partial(visual_genome.read_regions, region_type="mask")),
        GENOME,
    ),
    "refs": Format(pickle_cases(REFS), in_file("refs(umd).p", lambda folder: refcocog.read_refcocog(folder)), refs),
    "instances": Format(
        json_cases(INSTANCES),
        in_file("instances.json", lambda folder: refcocog.read_refcocog(folder, region_type="mask", grouped=True)),
        refs,
    ),
    "coco_captions": Format(
        json_cases(CAPTIONS),
        in_file("c.json", lambda folder: coco.read_coco(folder / "c.json", folder, region_type="mask")),
        writing(),
    ),
    "grit_json": Format(json_cases(GRIT), in_file("p.json", lambda folder: grit.read_grit(folder)), writing()),
    "grit_tar": Format(
        byte_cases(tar(p_json=json.dumps(GRIT).encode(), p_png=IMAGES["png"], q_txt=b"x")),
        in_file("a.tar", lambda folder: grit.read_grit(folder)),
        writing(),
    ),
    "mask_imagenet": Format(
        json_cases(MASK_ENTRIES),
        in_file(mask_imagenet.LIST, lambda folder: mask_imagenet.read_mask_imagenet(folder)),
        writing(),
    ),
    "jsonl": Format(
        json_cases(JSONL, lines=True),
        in_file("d.jsonl", lambda folder: jsonl.read_jsonl(folder / "d.jsonl")),
        writing(),
    ),
    "batch": Format(
        json_cases(REQUESTS, lines=True), in_file("r.jsonl", lambda folder: read_requests(str(folder / "r.jsonl")))
    ),
    "predictions": Format(
        json_cases(PREDICTIONS, lines=True), in_file("p.jsonl", lambda folder: read_predictions(folder / "p.jsonl"))
    ),
    "references_coco": Format(
        json_cases(COCO_REFERENCES), in_file("r.json", lambda folder: read_references(folder / "r.json"))
    ),
    "references_mdetr": Format(json_cases(MDETR), in_file("r.json", lambda folder: read_references(folder / "r.json"))),
    "recipe": Format(yaml_cases(RECIPE), read_recipe(parse_args), share=0.25),
    "contrastive_recipe": Format(yaml_cases(CONTRASTIVE), read_recipe(arguments.parse_args), share=0.25),
    "deepspeed": Format(json_cases(DEEPSPEED), in_file("ds.json", read_deepspeed), share=0.25),
    "region_json": Format(st.sampled_from(REGIONS_JSON).flatmap(json_cases), read_region),
    "region_text": Format(
        byte_cases(*REGION_TEXTS), lambda folder, content: use(Region.parse(content.decode("utf-8", "surrogateescape")))
    ),
    "rle": Format(
        st.one_of(json_cases(RLE), json_cases(COMPRESSED)), lambda folder, content: Region.from_rle(parsed(content))
    ),
    "mask": Format(
        byte_cases(encoded_image(MASK, "PNG"), encoded_image(MASK.convert("P"), "PNG"), IMAGES["png"], IMAGES["tiff"]),
        in_file("m.png", lambda folder: Region.from_mask(folder / "m.png")),
    ),
    "image": Format(byte_cases(*IMAGES.values()), in_file("i.png", lambda folder: load_image(folder / "i.png"))),
    "array": Format(array_cases(), read_array),
    "pth": Format(
        st.one_of(byte_cases(PTH), pickles_in_archives()),
        in_file("w.pth", lambda folder: conversion.read_tower(folder / "w.pth")),
    ),
    "safetensors": Format(
        st.one_of(byte_cases(SAFETENSORS), headers()),
        in_file("w.safetensors", lambda folder: conversion.read_tower(folder / "w.safetensors")),
    ),
    "adapter": Format(json_cases(ADAPTER), in_file("adapter_config.json", read_adapter_config)),
    "index": Format(
        json_cases(INDEX),
        lambda folder, content: in_file("index.json", read_index)(folder / "region_index", content),
        index,
    ),
}
