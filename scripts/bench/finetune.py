"""Time per part of a training step, and the effect of decoding an image once and of grouping samples by length.

    python scripts/bench/finetune.py [--steps 12] [--regions 8] [--image-size 224]

Both sides run alternately in one process, with the same model, dtype, attention and conversations per step. Ours: an
image is decoded, resized and normalized once for all its regions, and samples of similar length are in one batch.
Plain: each region decodes and prepares its image, in random order. Images are 640 x 480 JPEGs. Ratios are medians over
pairs of steps.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import Clock
from transformers import LlavaForConditionalGeneration

import mllm
from alpha_clip_commands.command_line import ArgumentParser, exit_code
from alpha_clip_commands.training.tuning_arguments import DataArguments, ModelArguments
from mllm.data.build_index import index_visual_genome
from mllm.data.index import RegionIndex
from mllm.llava import build_llava_processor
from mllm.messages import image_items
from train.epoch_sampler import EpochSampler
from train.tuning.collators import ConversationCollator
from train.tuning.conversations import Conversation, ConversationDataset
from train.tuning.trained_parts import prepare_model
from vision_tower import AlphaCLIPImageProcessor

PARTS = ("read", "decode", "prepare images", "encode and label", "forward", "backward", "optimizer")
WORDS = "the a clock man tree white wooden standing on of with his window black small table sky green is in".split()


PROGRAM = "bench/finetune.py"


class StepClock(Clock):
    """Seconds by part of a step, and the share of padding tokens."""

    padding = 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="pairs of steps after a warmup (default 12)")
    parser.add_argument("--regions", type=int, default=8, help="regions per image in a step (default 8)")
    parser.add_argument("--images", type=int, default=2, help="images in our step (default 2)")
    parser.add_argument(
        "--image-size", type=int, default=224, help="image size of the small model, with patches of 14 pixels"
    )
    args = parser.parse_args(argv)
    model, processor = small_model(args.image_size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), max(40, args.steps * args.images * 2), args.regions)
        index_visual_genome(folder)
        sides = {
            "ours": batches(Path(folder), processor, args.regions, args.images, shared=True),
            "plain": batches(Path(folder), processor, 1, args.images * args.regions, shared=False),
        }
        clocks: dict[str, list[StepClock]] = {name: [] for name in sides}
        for _ in range(args.steps + 1):
            for name, source in sides.items():
                clocks[name].append(step(model, ConversationCollator(processor), optimizer, next(source)))
    print_table({name: timed[1:] for name, timed in clocks.items()})
    return 0


def step(model, collator: ConversationCollator, optimizer, drawn: tuple[StepClock, list[Conversation]]) -> StepClock:
    """One step on a batch; the parts of the collator are timed separately."""
    clock, conversations = drawn
    items = [item for turns in conversations for item in image_items(turns)]
    pixels = clock.time("prepare images", collator.pixels, items)
    batch = clock.time("encode and label", collator.tokens, conversations)
    batch |= pixels
    clock.padding = 1 - float(batch["attention_mask"].float().mean())
    loss = clock.time("forward", lambda: model(**batch).loss)
    clock.time("backward", loss.backward)
    clock.time("optimizer", lambda: (optimizer.step(), optimizer.zero_grad()))
    return clock


def batches(folder: Path, processor, regions: int, size: int, shared: bool) -> Iterator[tuple[StepClock, list]]:
    """Batches of conversations, each with the time of reading and decoding."""
    args = DataArguments(data=[str(folder)], regions_per_image=regions)
    wordings = processor.description_wordings
    dataset = ConversationDataset([RegionIndex(folder)], args, "train", wordings, 0, folder / "skipped.jsonl")
    sampler = EpochSampler(len(dataset), 0, dataset.lengths if shared else None, size)
    order = [number for epoch in range(50) for number in _epoch(sampler, epoch)]
    for first in range(0, len(order) - size, size):
        clock, conversations = StepClock(PARTS), []
        for number in order[first : first + size]:
            index, rows = dataset.rows_of(number % len(dataset))
            indexed = clock.time("read", index.read, rows)
            image = clock.time("decode", indexed[0].sample.open_image)
            rng = np.random.default_rng(number)
            conversations += [dataset._conversation(entry, image, rng) for entry in indexed]
        yield clock, conversations


def _epoch(sampler: EpochSampler, epoch: int) -> Iterator[int]:
    sampler.set_epoch(epoch)
    return iter(sampler)


def print_table(clocks: dict[str, list[StepClock]]) -> None:
    """Medians by part, their ratios, and the complete step."""
    print("| part | ours, ms | plain, ms | ours / plain |\n|---|---|---|---|")
    for part in PARTS:
        ours, plain = ([clock.seconds[part] * 1e3 for clock in clocks[name]] for name in ("ours", "plain"))
        ratio = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
        print(f"| {part} | {statistics.median(ours):.1f} | {statistics.median(plain):.1f} | {ratio:.3f} |")
    for name, chosen in (("all data parts", PARTS[:4]), ("complete step", PARTS)):
        totals = [[sum(clock.seconds[part] for part in chosen) for clock in clocks[side]] for side in clocks]
        ratios = sorted(a / b for a, b in zip(*totals, strict=True))
        medians = [statistics.median(total) * 1e3 for total in totals]
        print(f"| {name} | {medians[0]:.1f} | {medians[1]:.1f} | {statistics.median(ratios):.3f} |")
    for side, timed in clocks.items():
        print(f"padding, {side}: {statistics.mean(clock.padding for clock in timed):.1%} of the tokens")
    spread = f"{1 / ratios[-1]:.2f} to {1 / ratios[0]:.2f}"
    print(f"samples per second, ours / plain: {1 / statistics.median(ratios):.2f} ({spread})")


def small_model(image_size: int) -> tuple[torch.nn.Module, object]:
    """A random LLaVA with LoRA and the width of the embedded model, and its processor for larger images."""
    embedded, processor = mllm.load(device="cpu", dtype="float32")
    config = embedded.config
    config.vision_config.image_size, config.vision_config.patch_size = image_size, 14
    config.image_seq_length = (image_size // 14) ** 2
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    images = AlphaCLIPImageProcessor.for_size(image_size, "pad")
    model = prepare_model(model, ModelArguments(lora_r=16, train_parts=["multi_modal_projector"]))
    return model, build_llava_processor(images, processor.tokenizer, config)


def write_images(folder: Path, count: int, regions: int) -> None:
    """640 x 480 JPEGs with boxes and descriptions of 1 to 25 words, in Visual Genome's layout."""
    rng, words = np.random.default_rng(0), random.Random(0)
    (folder / "VG_100K").mkdir()
    data, described = [], []
    for image in range(1, count + 1):
        pixels = np.kron(rng.integers(0, 256, (60, 80, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(pixels).save(folder / "VG_100K" / f"{image}.jpg", quality=90)
        data.append({"image_id": image, "width": 640, "height": 480, "url": f"VG_100K/{image}.jpg"})
        entries = []
        for number in range(regions):
            x, y = words.randrange(400), words.randrange(300)
            phrase = " ".join(words.choices(WORDS, k=words.randint(1, 25)))
            box = {"x": x, "y": y, "width": 100, "height": 80}
            entries.append({"region_id": image * 100 + number, "image_id": image, **box, "phrase": phrase})
        described.append({"id": image, "regions": entries})
    (folder / "image_data.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "region_descriptions.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "dataset.json").write_text('{"split": "train"}', encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
