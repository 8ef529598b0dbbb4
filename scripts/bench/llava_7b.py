"""LLaVA-1.5-7B at its real size, random weights: one region question through `region-chat`'s path; memory and seconds.

    python scripts/bench/llava_7b.py [--dtype bfloat16] [--load-in 4bit|8bit] [--keep DIR]

Writes a random checkpoint in the layout of llava-hf (14 GB, deleted at the end unless --keep), loads it as any other
model, and asks. Each phase's seconds and the peak memory of the whole process are printed.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import mllm
from alpha_clip_commands.command_line import ArgumentParser, exit_code
from mllm.files import write_json
from mllm.folders import claim_folder
from mllm.inference import RegionChat
from mllm.loading import EMBEDDED_MODEL
from vision_tower import Region

# Source: llava-hf/llava-1.5-7b-hf, config.json
VISION = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
VOCABULARY = 32064
NEW_TOKENS = 16
SHARD = 2_000_000_000  # bytes

PROGRAM = "bench/llava_7b.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-in", choices=["4bit", "8bit"])
    parser.add_argument("--keep", type=Path, help="folder for the checkpoint; one that is there is used again")
    args = parser.parse_args(argv)
    folder = args.keep or Path(tempfile.mkdtemp())
    try:
        if not (folder / "config.json").exists():
            claim_folder(folder, "benchmark")
            timed("write the checkpoint", lambda: write_checkpoint(folder))
        model, processor = timed(
            "load", lambda: mllm.load(folder, device="cpu", dtype=args.dtype, load_in=args.load_in)
        )
        count = sum(parameter.numel() for parameter in model.parameters())
        image = Image.effect_noise((640, 480), 60).convert("RGB")
        chat = RegionChat(model, processor)
        # random weights do not end an answer: every run makes all its tokens
        model.generation_config.eos_token_id = None
        region = Region.from_box(100, 80, 400, 300)
        timed(f"answer of {NEW_TOKENS} tokens", lambda: chat.describe(image, region, max_new_tokens=NEW_TOKENS))
        timed("the same again", lambda: chat.describe(image, region, max_new_tokens=NEW_TOKENS))
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{count / 1e9:.2f} billion stored numbers, {args.load_in or args.dtype}; peak memory {peak:.1f} GiB")
    return 0


def timed(name: str, run):
    """Run and print the seconds it took."""
    start = time.perf_counter()
    result = run()
    print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    return result


def write_checkpoint(folder: Path) -> None:
    """Random bfloat16 weights of LLaVA-1.5-7B, with the embedded model's tokenizer and CLIP's image settings."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=VISION, text_config=text, image_token_index=image_token, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlavaForConditionalGeneration(config).state_dict().items()}
    torch.manual_seed(0)
    index: dict[str, str] = {}
    for number, names in enumerate(shards(shapes), 1):
        file = f"model-{number:05d}.safetensors"
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    record = {"metadata": {}, "weight_map": index}
    write_json(folder / "model.safetensors.index.json", record)
    tokenizer.save_pretrained(folder)
    images = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}}
    images["crop_size"] = {"height": 336, "width": 336}
    write_json(folder / "preprocessor_config.json", images)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)


def shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    """Names of tensors by file, in order."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        names.append(name)
        size += 2 * shape.numel()
        if size > SHARD:
            yield names
            names, size = [], 0
    if names:
        yield names


if __name__ == "__main__":
    raise SystemExit(main())
