"""Contrastive training: what gradient caching takes and gives, and regions a second against the released training loop.

    python scripts/bench_alpha_clip.py memory [--pairs 3]    a batch of 1024 by gradient caching against one of 64
    python scripts/bench_alpha_clip.py speed [--rounds 5] [--dtype bf16] [--attention eager]
    python scripts/bench_alpha_clip.py gpu                   ViT-L/14-336 on one GPU; never run

Random weights; sides take turns in one process, and ratios are medians over the turns. `speed` restates the loop of
SunzeY/AlphaCLIP, train/ at e5676c9 (train_grit_1m.py, alpha_grit.py): each region decodes a picture of its own, which
is padded with black and resized as a float tensor; every text is padded to 77 tokens; attention is plain matrix
products. The model's code is ours on both sides. Pictures are made: 640 x 480 JPEGs in GRIT's layout.
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
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torch.nn.functional import interpolate, normalize
from transformers import CLIPTextConfig, CLIPTokenizer, TrainingArguments
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from train.alpha_clip import PARTS, prepare_model
from train.losses import released_loss
from train.region_text_arguments import PairArguments, TowerArguments
from train.region_text_data import RegionTextCollator, RegionTextDataset
from train.region_text_trainer import RegionTextTrainer
from train.run import open_index
from train.sampling import EpochSampler
from vision_tower import AlphaCLIPConfig, AlphaCLIPImageProcessor, AlphaCLIPModel, AlphaCLIPVisionConfig
from vision_tower.alpha_embedding import ALPHA_MEAN, ALPHA_STD

CONTEXT, VOCABULARY = 77, 49_408  # of CLIP's text tower
RATES = {"alpha": 2e-4}  # as in the recipes; 2e-6 for the rest
STEP_PARTS = ("read", "decode", "prepare pictures", "tokenise", "forward", "backward", "optimizer")
NOUNS = "man woman dog cat table chair window tree car street clock shirt plate boat bench train horse cup".split()
WORDS = "white black red small large wooden old young standing green parked blue open round".split()
JOINTS = ("on", "with", "in front of", "next to", "and", "behind")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    memory = _sizes(parts.add_parser("memory"), width=192, layers=6, image_size=96, patch_size=12, text_width=128)
    memory.add_argument("--batch", type=int, default=1024, help="pairs of the large batch")
    memory.add_argument("--chunk", type=int, default=64, help="pairs embedded at a time, and of the small batch")
    memory.add_argument("--pairs", type=int, default=3, help="timed pairs of cached and plain steps; 0 for none")
    memory.set_defaults(run=bench_memory)
    speed = _sizes(parts.add_parser("speed"), width=768, layers=12, image_size=224, patch_size=16, text_width=512)
    speed.add_argument("--rounds", type=int, default=5, help="timed rounds; one more to warm up")
    speed.add_argument("--regions", type=int, default=16, help="regions of a step")
    speed.add_argument("--per-picture", type=int, default=4, help="regions of a picture in a step of ours")
    speed.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")
    speed.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa", help="of ours")
    speed.set_defaults(run=bench_speed)
    gpu = _sizes(parts.add_parser("gpu"), width=1024, layers=24, image_size=336, patch_size=14, text_width=768)
    gpu.add_argument("--batch", type=int, default=256, help="pairs of a step")
    gpu.add_argument("--chunk", type=int, default=128, help="pairs embedded at a time in the largest batch")
    gpu.add_argument("--largest", type=int, default=32_768, help="stop doubling the cached batch here")
    gpu.set_defaults(run=bench_gpu)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        args.run(args, Path(folder))
    return 0


def _sizes(parser: argparse.ArgumentParser, **defaults: int) -> argparse.ArgumentParser:
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--text-layers", type=int, default=12)
    timed = "time the process's own seconds, not the wall's: where other work runs beside it, with OMP_NUM_THREADS=1"
    parser.add_argument("--cpu-time", action="store_true", help=timed)
    return parser


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
        run={},
        pair_args=PairArguments(data=[], **settings),
        decay_all=False,
        pictures=[],
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # Trainer sets it when a run begins
    trainer.model_wrapped = trainer.accelerator.prepare_model(model)
    return trainer


def random_batch(model: AlphaCLIPModel, pairs: int, device: str = "cpu", shared: bool = False) -> dict[str, Any]:
    """Pairs of noise and random texts of 16 tokens, each text of two pairs; `shared`: one picture, which takes no
    memory of its own.
    """
    generator, side = torch.Generator().manual_seed(1), model.config.vision_config.image_size
    pixels = torch.randn(1 if shared else pairs, 4, side, side, generator=generator).to(device)
    texts = max(pairs // 2, 1)
    ids = torch.randint(2, VOCABULARY, (texts, 16), generator=generator)
    ids[:, -1] = 1  # where the text tower's output is read
    of_pair = torch.arange(pairs) % texts
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "text_of": of_pair, "text_ids": of_pair.clone()}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return {**batch, "pixel_values": pixels.expand(pairs, -1, -1, -1), "names": ["noise"]}


def seconds(run: Callable[[], Any], timer: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call."""
    start = timer()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return timer() - start


def timer_of(args: argparse.Namespace) -> Callable[[], float]:
    """Wall time, or with --cpu-time the process's own."""
    return time.process_time if args.cpu_time else time.perf_counter


# ---- memory


def bench_memory(args: argparse.Namespace, folder: Path) -> None:
    """Gradient caching in float32: growth of memory, gradients and time against plain batches."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args).to(device)
    trainers = {
        chunk: trainer_of(model, folder, "fp32", device == "cpu", cache_chunk=chunk) for chunk in (0, args.chunk)
    }
    batches = {pairs: random_batch(model, pairs, device) for pairs in (args.chunk, args.batch)}
    # the same pairs back to front: what rounding alone does to the gradients
    of_pairs = ("pixel_values", "text_of", "text_ids")
    batches[0] = batches[args.batch] | {name: batches[args.batch][name].flip(0) for name in of_pairs}

    def step(pairs: int, chunk: int) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()  # kept, so that the gradients are no growth
        trainers[chunk].training_step(model, batches[pairs])

    step(args.chunk, 0)
    grown = {
        (pairs, chunk): growth(lambda: step(pairs, chunk), device) / 2**20  # noqa: B023
        for pairs, chunk in ((args.chunk, 0), (args.batch, args.chunk), (args.batch, 0))
    }
    print("| batch, float32 | beside weights, gradients and pictures, MiB | of the small batch's |\n|---|---|---|")
    for (pairs, chunk), size in grown.items():
        how = f"in chunks of {chunk}" if chunk else "plain"
        print(f"| {pairs}, {how} | {size:.0f} | {size / grown[args.chunk, 0]:.2f} |", flush=True)
    gradients = {}
    for name, pairs, chunk in (("plain", args.batch, 0), ("cached", args.batch, args.chunk), ("other order", 0, 0)):
        step(pairs, chunk)
        gradients[name] = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    print(f"\ngradients of {args.batch} in float32, worst difference from those of the plain batch")
    for name in ("cached", "other order"):
        print(f"- {name}: {differences(gradients[name], gradients['plain'])}")
    ratios = []
    for _ in range(args.pairs):
        cached, plain = (seconds(lambda: step(args.batch, chunk), timer_of(args)) for chunk in (args.chunk, 0))  # noqa: B023
        ratios.append(cached / plain)
    if ratios:
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs"
        print(f"time of a step, cached / plain: {statistics.median(ratios):.2f} ({spread})")


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    """The worst difference, of the largest gradient of all and of the largest in the same tensor."""
    apart = {name: float((found[name] - gradient).abs().max()) for name, gradient in expected.items()}
    sizes = {name: float(gradient.abs().max()) for name, gradient in expected.items()}
    # a key's bias moves all of a row's scores alike: softmax has no gradient there, only rounding
    own = {name: apart[name] / size for name, size in sizes.items() if not name.endswith("k_proj.bias")}
    worst = max(own, key=own.get)
    return (
        f"{max(apart.values()) / max(sizes.values()):.1e} of the largest gradient; {own[worst]:.1e} of the largest in "
        f"its own tensor ({worst}; key biases left out)"
    )


def growth(run: Callable[[], Any], device: str) -> int:
    """Bytes of tensors at most alive during a call beyond those before it; on a CPU as PyTorch's profiler counts every
    allocation and release.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    in_order = sorted(events, key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in in_order), initial=0))


# ---- speed


class Clock:
    """Seconds by part of a step."""

    def __init__(self, timer: Callable[[], float]) -> None:
        self.timer = timer
        self.seconds = dict.fromkeys(STEP_PARTS, 0.0)

    def time(self, part: str, call: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call, and add what it took."""
        start = self.timer()
        result = call(*args, **kwargs)
        self.seconds[part] += self.timer() - start
        return result

    def total(self, parts: tuple[str, ...] = STEP_PARTS) -> float:
        """Seconds of some parts."""
        return sum(self.seconds[part] for part in parts)


def bench_speed(args: argparse.Namespace, folder: Path) -> None:
    """Ours and the released loop, and steps on the way from one to the other."""
    data = folder / "grit"
    write_pictures(data, 4 * args.regions, max(args.per_picture, 6))
    model, tokenizer = build(args), train_tokenizer()
    trainer = trainer_of(model, folder, args.dtype, cpu=True)
    # one model for all sides; what our trainer puts around its forward the released side goes past, tower by tower
    released = Released(model, tokenizer, args.image_size, data, args.regions, bf16=args.dtype == "bf16")
    one, shared = (
        Ours(trainer, tokenizer, args.image_size, data, per_picture, args.regions)
        for per_picture in (1, args.per_picture)
    )
    other = "eager" if args.attention == "sdpa" else "sdpa"
    sides: dict[str, tuple[str, Callable[[Clock], None]]] = {
        "released": ("eager", released.step),
        "released, sdpa": ("sdpa", released.step),
        "ours, 1 a picture": (args.attention, one.step),
        f"ours, {args.per_picture} a picture": (args.attention, shared.step),
        f"ours, {args.per_picture}, {other}": (other, shared.step),
    }
    clocks: dict[str, list[Clock]] = {name: [] for name in sides}
    for _ in range(args.rounds + 1):
        for name, (attention, step) in sides.items():
            model.set_attn_implementation(attention)
            clocks[name].append(Clock(timer_of(args)))
            step(clocks[name][-1])
    print_speed({name: timed[1:] for name, timed in clocks.items()}, args)


class Released:
    """A step of the released loop, restated; the model is ours."""

    def __init__(
        self, model: AlphaCLIPModel, tokenizer: CLIPTokenizer, side: int, data: Path, regions: int, bf16: bool
    ) -> None:
        self.model, self.tokenizer, self.side, self.regions, self.bf16 = model, tokenizer, side, regions, bf16
        self.rng = random.Random(0)
        pictures = sorted(data.glob("*/*.jpg"))
        self.pictures = itertools.cycle(self.rng.sample(pictures, len(pictures)))
        alpha = model.vision_model.embeddings.patch_embedding.alpha.weight
        others = [p for p in model.parameters() if p.requires_grad and p is not alpha]
        self.optimizer = torch.optim.AdamW([{"params": [alpha], "lr": RATES["alpha"]}, {"params": others, "lr": 2e-6}])

    def step(self, clock: Clock) -> None:
        """As many pictures as regions."""
        pairs = [self.pair(clock, picture) for picture in itertools.islice(self.pictures, self.regions)]
        pixels = clock.time("prepare pictures", lambda: torch.stack([pair[0] for pair in pairs]))
        settings = {"padding": "max_length", "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
        ids = clock.time("tokenise", self.tokenizer, [pair[1] for pair in pairs], **settings)["input_ids"]
        clock.time("optimizer", self.optimizer.zero_grad)
        loss = clock.time("forward", self.loss, pixels, ids)
        clock.time("backward", loss.backward)
        clock.time("optimizer", self.optimizer.step)

    def pair(self, clock: Clock, picture: Path) -> tuple[torch.Tensor, str]:
        """(4, S, S) and the text of one region; of one in ten, the whole picture and its caption."""
        record = clock.time("read", lambda: json.loads(picture.with_suffix(".json").read_bytes()))
        pixels = clock.time("decode", lambda: np.asarray(Image.open(io.BytesIO(picture.read_bytes()))))
        number, whole = self.rng.randrange(len(record["ref_exps"])), self.rng.random() < 0.1
        start, end = (int(bound) for bound in record["ref_exps"][number][:2])
        tensor = clock.time("prepare pictures", self.prepare, pixels, record["seudo_masks"][number], whole)
        return tensor, record["caption"] if whole else record["caption"][start:end]

    def prepare(self, pixels: np.ndarray, rle: dict[str, Any], whole: bool) -> torch.Tensor:
        """Picture and mask padded with zeros to a square, as floats, resized as torchvision resizes tensors."""
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
        self.images = AlphaCLIPImageProcessor.for_size(side, "pad")
        settings = PairArguments(data=[str(data)], regions_per_image=count)
        self.dataset = RegionTextDataset([open_index(data)], settings, "train", 0, data / "skipped.jsonl")
        self.order = itertools.cycle(EpochSampler(len(self.dataset), 0))
        self.pictures = regions // count

    def step(self, clock: Clock) -> None:
        """As Trainer does it, on a fresh batch."""
        samples = [self.sample(clock, number) for number in itertools.islice(self.order, self.pictures)]
        images = functools.partial(clock.time, "prepare pictures", self.images)
        before = clock.seconds["prepare pictures"]
        collator = RegionTextCollator(SimpleNamespace(tokenizer=self.tokenizer, image_processor=images), CONTEXT)
        batch = clock.time("tokenise", collator, samples)
        clock.seconds["tokenise"] -= clock.seconds["prepare pictures"] - before
        trainer, accelerator = self.trainer, self.trainer.accelerator
        backward = functools.partial(clock.time, "backward", accelerator.backward)
        with mock.patch.object(accelerator, "backward", backward):
            took = seconds(lambda: trainer.training_step(trainer.model_wrapped, batch), clock.timer)
        clock.seconds["forward"] = took - clock.seconds["backward"]
        trained = [p for p in trainer.model.parameters() if p.grad is not None]
        clock.time("optimizer", accelerator.clip_grad_norm_, trained, 1.0)  # as the recipes do, the released loop not
        clock.time("optimizer", trainer.optimizer.step)
        clock.time("optimizer", trainer.optimizer.zero_grad)

    def sample(self, clock: Clock, number: int) -> Any:
        """A picture with its drawn regions, as `RegionTextDataset` makes it."""
        rng = np.random.default_rng(number)
        index, rows = self.dataset.rows_of(number)
        facts = clock.time("read", lambda: index.read(self.dataset.drawn_rows(index, rows, rng)))
        image = clock.time("decode", facts[0].sample.open_image)
        return clock.time("prepare pictures", self.dataset.made_of, facts, image, rng)


def print_speed(clocks: dict[str, list[Clock]], args: argparse.Namespace) -> None:
    """Medians of each part by side, and regions a second against the released loop."""
    print(f"{args.dtype}, {args.regions} regions a step, {args.rounds} rounds; ours: {args.attention} if not said\n")
    print(f"| part of a step, ms | {' | '.join(clocks)} |\n|---|{'---|' * len(clocks)}")

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


def write_pictures(folder: Path, count: int, regions: int) -> None:
    """640 x 480 JPEGs of as many ellipses, with captions, phrases and masks, in GRIT's layout."""
    rng, words = np.random.default_rng(0), random.Random(0)
    (folder / "00000").mkdir(parents=True)
    slope = np.linspace(0, 120, 640, dtype=np.float32)[None, :, None]
    for number in range(1, count + 1):
        picture = Image.fromarray((slope + rng.integers(0, 120, 3) + np.zeros((480, 1, 1))).astype(np.uint8))
        caption, rows, masks = "", [], []
        for _ in range(regions):
            x, y, width, height = words.randrange(440), words.randrange(300), words.randrange(60, 200), 120
            shape, mask = (x, y, x + width, y + height), Image.new("L", picture.size)
            ImageDraw.Draw(picture).ellipse(shape, fill=tuple(words.choices(range(256), k=3)))
            ImageDraw.Draw(mask).ellipse(shape, fill=1)
            rle = coco_mask.encode(np.asfortranarray(mask))
            masks.append({"size": rle["size"], "counts": rle["counts"].decode("ascii")})
            phrase = " ".join(["a", *words.sample(WORDS, words.randrange(3)), words.choice(NOUNS)])
            caption += f" {words.choice(JOINTS)} " if caption else ""
            box = (x / 640, y / 480, (x + width) / 640, (y + height) / 480)
            rows.append([float(len(caption)), float(len(caption) + len(phrase)), *box, 1.0])
            caption += phrase
        noisy = np.asarray(picture) + rng.normal(0, 8, (480, 640, 3))
        name = folder / "00000" / f"{number:09d}"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(name.with_suffix(".jpg"), quality=90)
        record = {"caption": caption, "width": 640, "height": 480, "ref_exps": rows, "seudo_masks": masks}
        name.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "dataset.json").write_text('{"split": "train"}', encoding="utf-8")


# ---- gpu: never run


def bench_gpu(args: argparse.Namespace, folder: Path) -> None:
    """ViT-L/14-336 in bf16 on one GPU: regions a second, peak memory, share of the matrix rate, largest cached batch.

    Never run: no GPU was at hand.
    """
    model = build(args).to("cuda")
    rate = matrix_rate()
    print("| batch, bf16 | regions a second | peak memory, GiB | share of the matrix rate |\n|---|---|---|---|")
    tokens = (args.image_size // args.patch_size) ** 2 + 1
    forward = args.layers * (2 * tokens * 12 * args.width**2 + 4 * tokens**2 * args.width)  # of one region

    def row(name: str, pairs: int, chunk: int, steps: int) -> bool:
        trainer = trainer_of(model, folder, "bf16", cpu=False, cache_chunk=chunk)
        batch = random_batch(model, pairs, shared=True)
        torch.cuda.reset_peak_memory_stats()

        def step() -> None:
            trainer.training_step(trainer.model_wrapped, batch)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        try:
            step()
            took = statistics.median(seconds(step) for _ in range(steps))
        except torch.OutOfMemoryError:
            trainer.optimizer.zero_grad()
            torch.cuda.empty_cache()
            print(f"| {pairs}, {name} | out of memory | | |", flush=True)
            return False
        share = 3 * forward * pairs / took / rate  # 3: what recomputing adds is no work done
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"| {pairs}, {name} | {pairs / took:.0f} | {peak:.1f} | {share:.2f} |", flush=True)
        return True

    row("plain", args.batch, 0, 5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    row("checkpointed", args.batch, 0, 5)
    pairs = 4096
    while pairs <= args.largest and row(f"checkpointed, in chunks of {args.chunk}", pairs, args.chunk, 1):
        pairs *= 2


def matrix_rate() -> float:
    """Floating-point operations a second of the tower's own matrix product in bf16."""
    a, b = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in ((577 * 64, 1024), (1024, 4096)))
    best = min(seconds(lambda: [a @ b for _ in range(20)]) for _ in range(10))
    return 20 * 2 * len(a) * 1024 * 4096 / best


if __name__ == "__main__":
    raise SystemExit(main())
