"""The command `alpha-clip`: convert and publish weights, prepare data, train the tower, and draw attention maps.

alpha-clip convert clip_l14_336_grit_20m_4xe.pth TOWER
alpha-clip train alpha_clip_l14 --data GRIT --output_dir OUT
alpha-clip COMMAND --help                        (each has an example)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from alpha_clip_commands.command_line import (
    LAUNCHER_FLAGS,
    ArgumentParser,
    add_command,
    check_found,
    check_model,
    exit_code,
    hide_loading_bars,
    leave_current_folder,
)
from alpha_clip_commands.flag_values import positive_number
from alpha_clip_commands.model_options import DTYPES
from alpha_clip_commands.progress import STARTING, step
from alpha_clip_commands.region_options import REGION_OPTIONS, add_region_options, check_region
from alpha_clip_commands.source_values import constant

PROGRAM = "alpha-clip"


class Subcommand(NamedTuple):
    """A subcommand: the function `run` of a module.

    Attributes:
        module: The module.
        reads: Arguments that are files or folders, which must exist.
        model: The argument that is a model directory or hub id.
        has_bar: Whether it has a progress bar.
    """

    module: str
    reads: tuple[str, ...] = ()
    model: str | None = None
    has_bar: bool = False


SUBCOMMANDS = {
    "convert": Subcommand("mllm.convert.alpha_clip", reads=("source",), model="text_from"),
    "convert-lavis": Subcommand("mllm.convert.lavis", reads=("checkpoint", "vision_tower"), model="language_model"),
    "prepare": Subcommand("mllm.data.prepare", reads=("source", "against")),
    "shapes": Subcommand("mllm.data.shapes.cli", has_bar=True),
    "attention-map": Subcommand("eval.attention_map", reads=("image",), model="model"),
    "score": Subcommand("train.contrastive.score", reads=("data",), model="model", has_bar=True),
    "plot": Subcommand("train.plot", reads=("runs",)),
    "merge": Subcommand("mllm.convert.merge", reads=("adapter", "alpha_weights"), model="model"),
    "export": Subcommand("mllm.convert.export", reads=("adapter", "alpha_weights"), model="model"),
    "publish": Subcommand("mllm.publish", reads=("folder",)),
}


def build_parser() -> argparse.ArgumentParser:
    """All flags of the command."""
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('alpha-clip-mllm')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_convert_lavis(commands)
    _add_prepare(commands)
    commands.add_parser("train", help="train an Alpha-CLIP from a CLIP on regions and texts", add_help=False)
    _add_attention_map(commands)
    _add_score(commands)
    _add_plot(commands)
    _add_merge(commands)
    _add_export(commands)
    _add_publish(commands)
    _add_shapes(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 after a one-line error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if (first := next((arg for arg in argv if not arg.startswith(LAUNCHER_FLAGS)), None)) == "train":
        from alpha_clip_commands.region_tune import train_alpha_clip

        argv.remove(first)
        return train_alpha_clip(argv)
    program = f"{PROGRAM} {argv[0]}" if argv and argv[0] in SUBCOMMANDS else PROGRAM
    return exit_code(program, lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    subcommand = SUBCOMMANDS[args.command]
    for name in subcommand.reads:
        value = getattr(args, name)
        check_found(name.replace("_", " "), *(value if isinstance(value, list) else [value] if value else []))
    if subcommand.model and (model := getattr(args, subcommand.model)) is not None:
        check_model(model)
    if args.command in _CHECKS:
        _CHECKS[args.command](args)
    leave_current_folder()
    with step(STARTING):
        run = importlib.import_module(subcommand.module).run
        hide_loading_bars()
    with contextlib.nullcontext() if subcommand.has_bar else step(f"{PROGRAM} {args.command}"):
        return run(args)


def _add_convert(commands) -> None:
    parser = add_command(
        commands,
        "convert",
        "convert Alpha-CLIP weights to a Hugging Face directory, and back",
        """  alpha-clip convert CKPT OUT                    loads as AlphaCLIPVisionModel[WithProjection]
  alpha-clip convert CKPT OUT --text-from CLIP   loads as AlphaCLIPModel, for zero-shot use
  alpha-clip convert CKPT OUT --fused            loads in stock CLIP and LLaVA, 4 input channels
  alpha-clip convert LLAVA_DIR OUT --fused       the same for a LLaVA with an alpha tower
  alpha-clip convert DIR OUT.pth --original      from a converted directory back to the original layout

The released checkpoints:

"""
        + constant("vision_tower/conversion.py", "RELEASED_CHECKPOINTS"),
    )
    parser.add_argument(
        "source", metavar="CKPT", type=Path, help="original .pth or .safetensors file, or a converted directory"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="new directory (with --original: new file)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--text-from", metavar="DIR|HUB_ID", help="a CLIP whose text tower is added")
    kind.add_argument("--fused", action="store_true", help="write a stock CLIP tower (or LLaVA) with four channels")
    kind.add_argument("--original", action="store_true", help="write the original layout (.pth or .safetensors)")


def _check_convert(args: argparse.Namespace) -> None:
    if args.source.is_dir():
        check_model(args.source)
    if args.out.suffix in (".pth", ".pt", ".safetensors") and not args.original:
        raise ValueError(f"expected a directory as OUT, got {args.out}; use --original to write a checkpoint file")


def _add_convert_lavis(commands) -> None:
    parser = add_command(
        commands,
        "convert-lavis",
        "convert LAVIS' BLIP-2 with a CLIP ViT-L to a Hugging Face directory",
        """  alpha-clip convert-lavis blip2_pretrained_flant5xl_vitL.pth OUT --language-model google/flan-t5-xl \\
      --vision-tower clip_l14_grit20m_fultune_2xe.pth

The directory loads as AlphaBlip2ForConditionalGeneration and with mllm.load (docs/blip2.md). LAVIS' file does
not contain the language model and usually not the frozen tower, so both must be given.""",
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="LAVIS' .pth")
    parser.add_argument("out", metavar="OUT", type=Path, help="new directory")
    parser.add_argument("--language-model", metavar="DIR|HUB_ID", required=True, help="T5 or OPT, with its tokenizer")
    parser.add_argument(
        "--vision-tower", metavar="CKPT|DIR", help="Alpha-CLIP ViT-L/14 (default: the CLIP in CKPT, with alpha zero)"
    )
    parser.add_argument(
        "--blocks",
        type=positive_number,
        default=constant("mllm/convert/lavis_keys.py", "VIT_L_BLOCKS"),
        help="layers of the tower that the Q-Former was trained on: %(default)s in current LAVIS, 21 in its first "
        "releases (docs/blip2.md)",
    )
    parser.add_argument(
        "--new-projection",
        action="store_true",
        help="for a stage-1 CKPT: add a random projection, to be trained",
    )


def _add_prepare(commands) -> None:
    parser = add_command(
        commands,
        "prepare",
        "check a dataset, report its errors, and write the index that training reads",
        """  alpha-clip prepare vg --source VG
  alpha-clip prepare refcocog --source REFCOCOG --against VG llava_v1_5_mix665k.json
  alpha-clip prepare jsonl --source mine.jsonl

--against lists the training images that are in a test split of another dataset (Visual Genome and RefCOCOg share
COCO's images), or the test images in LLaVA-1.5's training mix.""",
    )
    kinds = constant("mllm/data/prepare.py", "FILES")
    parser.add_argument("kind", choices=kinds, help="layout of the dataset (vg: Visual Genome)")
    parser.add_argument(
        "--source", type=Path, required=True, help="folder of the dataset's original files (jsonl: the file)"
    )
    index = constant("mllm/data/index.py", "INDEX_FOLDER")
    parser.add_argument("--out", type=Path, help=f"folder of the index (default: {index} in or next to the source)")
    parser.add_argument("--split-by", default="umd", choices=("umd", "google", "unc"), help="split of refcocog")
    parser.add_argument("--against", nargs="*", default=[], type=Path, help="folders or LLaVA's JSON to compare with")


def _add_attention_map(commands) -> None:
    parser = add_command(
        commands,
        "attention-map",
        "draw the attention of an Alpha-CLIP for each region, and the similarity to texts",
        """  alpha-clip attention-map --model TOWER --image photo.jpg --box 40,60,220,200 --box 5,5,80,90 --out map.png
  alpha-clip attention-map --model MODEL --image photo.jpg --mask cat.png --text "a cat" "a dog" --out map.png""",
    )
    parser.add_argument("--model", required=True, help="directory or hub id of an Alpha-CLIP, or of a CLIP")
    parser.add_argument("--image", metavar="FILE", required=True, help="the image")
    add_region_options(
        parser, lambda form: {"dest": "regions", "action": "append", "default": [], "type": f"{form}:{{}}".format}
    )
    parser.add_argument("--text", metavar="TEXT", nargs="+", action="extend", default=[], help="texts to compare with")
    parser.add_argument("--heads", metavar="N[,N]", help="attention heads, counted from 1 (default: the mean of all)")
    parser.add_argument("--out", metavar="PNG", required=True, help="PNG to write")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


def _check_attention_map(args: argparse.Namespace) -> None:
    if not args.regions:
        raise ValueError(f"expected a region, one of {', '.join(f'--{option}' for option in REGION_OPTIONS)}")
    if not all(text.strip() for text in args.text):
        raise ValueError("expected non-empty texts as --text")
    if Path(args.out).suffix.lower() != ".png":
        raise ValueError(f"expected --out FILE.png, got {args.out}")
    for region in args.regions:
        check_region(region)


def _add_score(commands) -> None:
    parser = add_command(
        commands,
        "score",
        "score the matching of regions and texts by a CLIP or Alpha-CLIP",
        """  alpha-clip score --model MODEL --data GRIT
  alpha-clip score --model openai/clip-vit-large-patch14 --data VG --view crop

The columns are those of docs/ablations.md. A plain CLIP has no alpha and needs another --view. Its images are padded
to a square.""",
    )
    parser.add_argument("--model", required=True, help="directory or hub id of a model with text tower and processor")
    parser.add_argument("--data", type=Path, required=True, help="folder or .jsonl that `alpha-clip train` reads")
    parser.add_argument("--split", default="test", help="of the data (default test)")
    parser.add_argument(
        "--images",
        type=positive_number,
        default=2000,
        help="maximum number of images, evenly spaced, kept in memory",
    )
    parser.add_argument("--region-input", choices=("mask", "box", "available"), default="mask", help="default: mask")
    views = constant("eval/region_matching.py", "TOWER_VIEWS")
    parser.add_argument("--view", choices=views, default="alpha", help="how the region is shown (default alpha)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")


def _add_plot(commands) -> None:
    parser = add_command(
        commands,
        "plot",
        "plot the loss and the evaluations of training runs",
        "  alpha-clip plot OUT --out curves.png",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="output folders, plotted as the stages of one model",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="PNG to write")


def _add_merge(commands) -> None:
    parser = add_command(
        commands,
        "merge",
        "merge a LoRA adapter into its model, which then loads without PEFT",
        "  alpha-clip merge OUT MERGED --model llava-hf/llava-1.5-7b-hf --alpha-weights clip_l14_336_grit_20m_4xe.pth",
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="output folder of region-tune")
    parser.add_argument("out", type=Path, metavar="OUT", help="new directory")
    parser.add_argument("--model", help="the model that the adapter was trained for (default: the embedded model)")
    parser.add_argument("--alpha-weights", metavar="CKPT|DIR", help="those used in training")


def _add_export(commands) -> None:
    parser = add_command(
        commands,
        "export",
        "export a LLaVA to stock classes, which load without this package",
        """  alpha-clip export DIR OUT
  alpha-clip export llava-hf/llava-1.5-7b-hf OUT --alpha-weights clip_l14_336_grit_20m_4xe.pth --adapter ADAPTER

AutoProcessor.from_pretrained(OUT, trust_remote_code=True) loads its processor, which accepts regions
(docs/export.md). A BLIP-2 is saved with its source files, since no stock class supports its tower.""",
    )
    parser.add_argument("model", metavar="DIR|HUB_ID", help="a LLaVA-1.5 with an Alpha-CLIP or CLIP tower, or a BLIP-2")
    parser.add_argument("out", metavar="OUT", type=Path, help="new directory")
    parser.add_argument("--adapter", metavar="DIR", type=Path, help="a LoRA adapter to merge first")
    parser.add_argument("--alpha-weights", metavar="CKPT|DIR", help="replace the tower's weights first")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="default: as stored")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


def _add_publish(commands) -> None:
    parser = add_command(
        commands,
        "publish",
        "upload a tower, a LLaVA or BLIP-2 with one, or a LoRA adapter, with a model card",
        """  alpha-clip publish DIR OWNER/NAME --built-from alpha-clip llava-1.5 --base-model ID
  alpha-clip publish DIR OWNER/NAME --to FOLDER      write the files without uploading them

A README.md in DIR is an error unless --keep-card publishes it unchanged. The empty template that PEFT writes next to
an adapter is replaced.""",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="model or adapter directory")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="repository on the hub")
    terms = parser.add_mutually_exclusive_group()
    licenses = constant("mllm/model_card.py", "LICENSES")
    terms.add_argument("--built-from", nargs="+", default=[], choices=licenses, help="origins of the weights")
    terms.add_argument("--license", metavar="ID", help="the hub's id of the license, for weights of another origin")
    parser.add_argument("--base-model", metavar="ID", help="hub id of the model that this one was made from")
    parser.add_argument("--language", nargs="+", default=[], metavar="CODE", help="languages of answers, such as en")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--keep-card", action="store_true", help="publish the README.md in DIR as the card")
    parser.add_argument("--to", metavar="FOLDER", type=Path, help="write the files there instead of uploading them")


def _check_publish(args: argparse.Namespace) -> None:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo_id) is None:
        raise ValueError(f"expected OWNER/NAME, got {args.repo_id!r}")


def _add_shapes(commands) -> None:
    parser = add_command(
        commands,
        "shapes",
        "generate a Shapes dataset: synthetic scenes like those that the embedded model was trained on",
        """  alpha-clip shapes --out DIR --images 1000 --seed 7 --split test
  alpha-clip shapes --out DIR --images 8000 --seed 1 --layout grit      captions and phrases, for alpha-clip train""",
    )
    parser.add_argument("--out", required=True, help="folder of the dataset: new, empty, or a previous output")
    parser.add_argument("--images", type=positive_number, required=True, help="number of scenes")
    parser.add_argument("--seed", type=int, required=True, help="equal seeds give equal scenes")
    parser.add_argument("--split", choices=constant("mllm/data/shapes/scenes.py", "SPLITS"), default="train")
    parser.add_argument(
        "--layout", choices=("vg", "grit"), default="vg", help="vg: Visual Genome's and RefCOCOg's (default); grit"
    )
    parser.add_argument("--places", action="store_true", help="vg: add questions about the position of each object")
    parser.add_argument("--tars", type=positive_number, help="grit: write N webdataset tars instead of folders")
    fewest, most = (constant("mllm/data/shapes/world.py", f"{which}_OBJECTS") for which in ("MIN", "MAX"))
    parser.add_argument(
        "--min-objects", type=positive_number, help=f"grit: minimum number of objects (default {fewest})"
    )
    parser.add_argument("--max-objects", type=positive_number, help=f"grit: maximum number of objects (default {most})")


def _check_shapes(args: argparse.Namespace) -> None:
    if args.layout == "grit" and args.places:
        raise ValueError("--places requires --layout vg, as GRIT has no questions")
    of_grit = {"--tars": args.tars, "--min-objects": args.min_objects, "--max-objects": args.max_objects}
    if args.layout == "vg" and (given := [flag for flag, value in of_grit.items() if value is not None]):
        raise ValueError(f"{', '.join(given)}: only with --layout grit")


_CHECKS = {
    "convert": _check_convert,
    "attention-map": _check_attention_map,
    "publish": _check_publish,
    "shapes": _check_shapes,
}


if __name__ == "__main__":
    raise SystemExit(main())
