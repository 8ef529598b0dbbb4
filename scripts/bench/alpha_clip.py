"""Regions per second of contrastive training compared with the released training loop, and time per part of a step.

    python scripts/bench/alpha_clip.py [--rounds 5] [--dtype bf16] [--attention eager]

Random weights; both sides run alternately in one process, and ratios are medians. The released loop is reimplemented
from SunzeY/AlphaCLIP, train/ at e5676c9 (train_grit_1m.py, alpha_grit.py): each region decodes its own image, which is
padded with black and resized as a float tensor; texts are padded to 77 tokens; attention uses plain matrix products.
Both sides use our model code. Images are synthetic 640 x 480 JPEGs in GRIT's layout.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from timing import Clock, seconds
from torch.nn.functional import interpolate, normalize
from transformers import CLIPTextConfig, CLIPTokenizer, TrainingArguments
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from alpha_clip_commands.command_line import ArgumentParser, exit_code
from alpha_clip_commands.training.contrastive_arguments import PairArguments, TowerArguments
from train.contrastive.data import RegionTextCollator, RegionTextDataset
from train.contrastive.losses import released_loss
from train.contrastive.trained_parts import PARTS, prepare_model
from train.contrastive.trainer import RegionTextTrainer
from train.epoch_sampler import EpochSampler
from train.run import open_index
from vision_tower import AlphaCLIPConfig, AlphaCLIPImageProcessor, AlphaCLIPModel, AlphaCLIPVisionConfig
from vision_tower.alpha_embedding import ALPHA_MEAN, ALPHA_STD

CONTEXT, VOCABULARY = 77, 49_408  # of CLIP's text tower
RATES = {"alpha": 2e-4}  # as in the recipes; 2e-6 for the rest
STEP_PARTS = ("read", "decode", "prepare images", "tokenize", "forward", "backward", "optimizer")
NOUNS = "man woman dog cat table chair window tree car street clock shirt plate boat bench train horse cup".split()
WORDS = "white black red small large wooden old young standing green parked blue open round".split()
JOINTS = ("on", "with", "in front of", "next to", "and", "behind")

PROGRAM = "bench/alpha_clip.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, width=768, layers=12, image_size=224, patch_size=16, text_width=512)
    add_cpu_time(parser)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after a warmup round")
    parser.add_argument("--regions", type=int, default=16, help="regions per step")
    parser.add_argument("--per-image", type=int, default=4, help="regions per image in our step")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa", help="of ours")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        bench(args, Path(folder))
    return 0


def add_sizes(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Flags of the sizes of a random CLIP."""
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--text-layers", type=int, default=12)


def add_cpu_time(parser: argparse.ArgumentParser) -> None:
    """The flag that `timer_of` reads."""
    timed = "measure CPU time instead of wall time, with OMP_NUM_THREADS=1, if other programs are running"
    parser.add_argument("--cpu-time", action="store_true", help=timed)


def build(args: argparse.Namespace) -> AlphaCLIPModel:
    """A random CLIP of the sizes, image tower, projection and alpha trained, text tower frozen as in the recipes."""
    torch.manual_seed(0)

    def tower(width: int, layers: int) -> dict[str, int]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return {**sizes, "num_attention_heads": max(width // 64, 1), "projection_dim": args.text_width}

    vision = AlphaCLIPVisionConfig(
        **tower(args.width, args.layers), image_size=args.image_size, patch_size=args.patch_size
    )
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = CLIPTextConfig(**tower(args.text_width, args.text_layers), vocab_size=VOCABULARY, **special)
    config = AlphaCLIPConfig(vision_config=vision, text_config=text, projection_dim=args.text_width)
    return prepare_model(AlphaCLIPModel(config), TowerArguments(model=""))


def trainer_of(model: AlphaCLIPModel, folder: Path, dtype: str, cpu: bool, **settings: Any) -> RegionTextTrainer:
    """Our trainer around a model, with its optimizer."""
    out, bf16 = str(folder / "out"), dtype == "bf16"
    trainer = RegionTextTrainer(
        model=model,
        args=TrainingArguments(out, use_cpu=cpu, bf16=bf16, learning_rate=2e-6, report_to=[]),
        parts=PARTS,
        rates=RATES,
        optimizer_name="trainer",
        run_config={},
        pair_args=PairArguments(data=[], **settings),
        decay_all=False,
        validation_images=[],
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # Trainer sets it when a run begins
    trainer.model_wrapped = trainer.accelerator.prepare_model(model)
    return trainer


def timer_of(args: argparse.Namespace) -> Callable[[], float]:
    """Wall time, or CPU time with --cpu-time."""
    return time.process_time if args.cpu_time else time.perf_counter


def bench(args: argparse.Namespace, folder: Path) -> None:
    """Ours and the released loop, and steps on the way from one to the other."""
    data = folder / "grit"
    write_images(data, 4 * args.regions, max(args.per_image, 6))
    model, tokenizer = build(args), train_tokenizer()
    trainer = trainer_of(model, folder, args.dtype, cpu=True)
    # one model for all sides; what our trainer puts around its forward the released side goes past, tower by tower
    released = Released(model, tokenizer, args.image_size, data, args.regions, bf16=args.dtype == "bf16")
    one, shared = (
        Ours(trainer, tokenizer, args.image_size, data, per_image, args.regions) for per_image in (1, args.per_image)
    )
    other = "eager" if args.attention == "sdpa" else "sdpa"
    sides: dict[str, tuple[str, Callable[[Clock], None]]] = {
        "released": ("eager", released.step),
        "released, sdpa": ("sdpa", released.step),
        "ours, 1 a image": (args.attention, one.step),
        f"ours, {args.per_image} a image": (args.attention, shared.step),
        f"ours, {args.per_image}, {other}": (other, shared.step),
    }
    clocks: dict[str, list[Clock]] = {name: [] for name in sides}
    for _ in range(args.rounds + 1):
        for name, (attention, step) in sides.items():
            model.set_attn_implementation(attention)
            clocks[name].append(Clock(STEP_PARTS, timer_of(args)))
            step(clocks[name][-1])
    print_speed({name: timed[1:] for name, timed in clocks.items()}, args)


class Released:
    """A step of the released loop, restated; the model is ours."""

    def __init__(
        self, model: AlphaCLIPModel, tokenizer: CLIPTokenizer, side: int, data: Path, regions: int, bf16: bool
    ) -> None:
        self.model, self.tokenizer, self.side, self.regions, self.bf16 = model, tokenizer, side, regions, bf16
        self.rng = random.Random(0)
        images = sorted(data.glob("*/*.jpg"))
        self.images = itertools.cycle(self.rng.sample(images, len(images)))
        alpha = model.vision_model.embeddings.patch_embedding.alpha.weight
        others = [p for p in model.parameters() if p.requires_grad and p is not alpha]
        self.optimizer = torch.optim.AdamW([{"params": [alpha], "lr": RATES["alpha"]}, {"params": others, "lr": 2e-6}])

    def step(self, clock: Clock) -> None:
        """As many images as regions."""
        pairs = [self.pair(clock, image) for image in itertools.islice(self.images, self.regions)]
        pixels = clock.time("prepare images", lambda: torch.stack([pair[0] for pair in pairs]))
        settings = {"padding": "max_length", "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
        ids = clock.time("tokenize", self.tokenizer, [pair[1] for pair in pairs], **settings)["input_ids"]
        clock.time("optimizer", self.optimizer.zero_grad)
        loss = clock.time("forward", self.loss, pixels, ids)
        clock.time("backward", loss.backward)
        clock.time("optimizer", self.optimizer.step)

    def pair(self, clock: Clock, image: Path) -> tuple[torch.Tensor, str]:
        """(4, S, S) and the text of one region; of one in ten, the whole image and its caption."""
        record = clock.time("read", lambda: json.loads(image.with_suffix(".json").read_bytes()))
        pixels = clock.time("decode", lambda: np.asarray(Image.open(io.BytesIO(image.read_bytes()))))
        number, whole = self.rng.randrange(len(record["ref_exps"])), self.rng.random() < 0.1
        start, end = (int(bound) for bound in record["ref_exps"][number][:2])
        tensor = clock.time("prepare images", self.prepare, pixels, record["seudo_masks"][number], whole)
        return tensor, record["caption"] if whole else record["caption"][start:end]

    def prepare(self, pixels: np.ndarray, rle: dict[str, Any], whole: bool) -> torch.Tensor:
        """Image and mask padded with zeros to a square, as floats, resized as torchvision resizes tensors."""
        joined = np.concatenate([pixels, coco_mask.decode(rle)[..., None] * np.uint8(255)], axis=-1)
        height, width = joined.shape[:2]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        joined = np.pad(joined, ((top, side - height - top), (left, side - width - left), (0, 0)))
        if whole:
            joined[..., 3] = 255
        floats = torch.from_numpy(np.ascontiguousarray(joined.transpose(2, 0, 1))).float() / 255
        made = []
        for channels, mode, mean, std in (
            (slice(0, 3), "bicubic", OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
            (slice(3, 4), "bilinear", [ALPHA_MEAN], [ALPHA_STD]),
        ):
            size = (self.side, self.side)
            resized = interpolate(floats[None, channels], size, mode=mode, antialias=True)[0]
            made.append((resized - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
        return torch.cat(made)

    def loss(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Every text through the text tower, without a mask of its padding."""
        model = self.model
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            images = model.visual_projection(model.vision_model(pixels).pooler_output)
            texts = model.text_projection(model.text_model(ids).pooler_output)
            images, texts = (normalize(rows, dim=-1) for rows in (images, texts))
        return released_loss(images, texts, model.logit_scale.detach().exp())


class Ours:
    """A step of our training: its data set, collator, trainer and optimizer."""

    def __init__(
        self, trainer: RegionTextTrainer, tokenizer: CLIPTokenizer, side: int, data: Path, count: int, regions: int
    ) -> None:
        self.trainer, self.tokenizer = trainer, tokenizer
        self.image_processor = AlphaCLIPImageProcessor.for_size(side, "pad")
        settings = PairArguments(data=[str(data)], regions_per_image=count)
        self.dataset = RegionTextDataset([open_index(data)], settings, "train", 0, data / "skipped.jsonl")
        self.order = itertools.cycle(EpochSampler(len(self.dataset), 0))
        self.images = regions // count

    def step(self, clock: Clock) -> None:
        """As Trainer does it, on a fresh batch."""
        samples = [self.sample(clock, number) for number in itertools.islice(self.order, self.images)]
        images = functools.partial(clock.time, "prepare images", self.image_processor)
        before = clock.seconds["prepare images"]
        collator = RegionTextCollator(SimpleNamespace(tokenizer=self.tokenizer, image_processor=images), CONTEXT)
        batch = clock.time("tokenize", collator, samples)
        clock.seconds["tokenize"] -= clock.seconds["prepare images"] - before
        trainer, accelerator = self.trainer, self.trainer.accelerator
        backward = functools.partial(clock.time, "backward", accelerator.backward)
        with mock.patch.object(accelerator, "backward", backward):
            took = seconds(lambda: trainer.training_step(trainer.model_wrapped, batch), clock.timer)
        clock.seconds["forward"] = took - clock.seconds["backward"]
        trained = [p for p in trainer.model.parameters() if p.grad is not None]
        clock.time("optimizer", accelerator.clip_grad_norm_, trained, 1.0)  # unlike the released loop
        clock.time("optimizer", trainer.optimizer.step)
        clock.time("optimizer", trainer.optimizer.zero_grad)

    def sample(self, clock: Clock, number: int) -> Any:
        """An image with some of its regions, as `RegionTextDataset` returns it."""
        rng = np.random.default_rng(number)
        index, rows = self.dataset.rows_of(number)
        indexed = clock.time("read", lambda: index.read(self.dataset.select_rows(index, rows, rng)))
        image = clock.time("decode", indexed[0].sample.open_image)
        items = [clock.time("prepare images", self.dataset.build_item, entry, image, rng) for entry in indexed]
        return self.dataset.build_sample(indexed[0].sample.id, image, items)


def print_speed(clocks: dict[str, list[Clock]], args: argparse.Namespace) -> None:
    """Medians of each part by side, and regions per second compared with the released loop."""
    print(f"{args.dtype}, {args.regions} regions per step, {args.rounds} rounds; ours: {args.attention} by default\n")
    print(f"| part, ms | {' | '.join(clocks)} |\n|---|{'---|' * len(clocks)}")

    def line(name: str, parts: tuple[str, ...]) -> None:
        medians = [statistics.median(clock.total(parts) * 1e3 for clock in timed) for timed in clocks.values()]
        print(f"| {name} | {' | '.join(f'{median:.0f}' if median >= 10 else f'{median:.1f}' for median in medians)} |")

    for part in STEP_PARTS:
        line(part, (part,))
    line("data, all of it", STEP_PARTS[:4])
    line("the whole step", STEP_PARTS)
    for name, parts in (("data", STEP_PARTS[:4]), ("model", STEP_PARTS[4:]), ("whole step", STEP_PARTS)):
        cells = []
        for timed in clocks.values():
            pairs = zip(clocks["released"], timed, strict=True)
            ratios = [theirs.total(parts) / ours.total(parts) for theirs, ours in pairs]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"| times as fast as released, {name} | {' | '.join(cells)} |")


def train_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer in which each word of the captions is one token, as the common words of CLIP's own are."""
    empty = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    return empty.train_new_from_iterator([" ".join(("a", *NOUNS, *WORDS, *JOINTS))] * 2, vocab_size=2000)


def write_images(folder: Path, count: int, regions: int) -> None:
    """640 x 480 JPEGs of as many ellipses, with captions, phrases and masks, in GRIT's layout."""
    rng, words = np.random.default_rng(0), random.Random(0)
    (folder / "00000").mkdir(parents=True)
    slope = np.linspace(0, 120, 640, dtype=np.float32)[None, :, None]
    for number in range(1, count + 1):
        image = Image.fromarray((slope + rng.integers(0, 120, 3) + np.zeros((480, 1, 1))).astype(np.uint8))
        caption, rows, masks = "", [], []
        for _ in range(regions):
            x, y, width, height = words.randrange(440), words.randrange(300), words.randrange(60, 200), 120
            shape, mask = (x, y, x + width, y + height), Image.new("L", image.size)
            ImageDraw.Draw(image).ellipse(shape, fill=tuple(words.choices(range(256), k=3)))
            ImageDraw.Draw(mask).ellipse(shape, fill=1)
            rle = coco_mask.encode(np.asfortranarray(mask))
            masks.append({"size": rle["size"], "counts": rle["counts"].decode("ascii")})
            phrase = " ".join(["a", *words.sample(WORDS, words.randrange(3)), words.choice(NOUNS)])
            caption += f" {words.choice(JOINTS)} " if caption else ""
            box = (x / 640, y / 480, (x + width) / 640, (y + height) / 480)
            rows.append([float(len(caption)), float(len(caption) + len(phrase)), *box, 1.0])
            caption += phrase
        noisy = np.asarray(image) + rng.normal(0, 8, (480, 640, 3))
        name = folder / "00000" / f"{number:09d}"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(name.with_suffix(".jpg"), quality=90)
        record = {"caption": caption, "width": 640, "height": 480, "ref_exps": rows, "seudo_masks": masks}
        name.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "dataset.json").write_text('{"split": "train"}', encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
