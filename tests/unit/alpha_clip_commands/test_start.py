"""How commands start: help and usage errors before anything large is imported, from folders with a train.py too."""

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from alpha_clip_commands import alpha_clip, source_values, task_names
from eval.tasks import TASKS

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
SUBCOMMANDS = {
    "region-eval": ("run", "score", "compare", "export", "tasks"),
    "alpha-clip": (*alpha_clip.SUBCOMMANDS, "train"),
}
LARGE = ("torch", "transformers", "numpy", "PIL", "vision_tower", "mllm", "eval", "train")
# One process runs them all: what one has imported stays.
RUN_ALL = """
import contextlib, importlib, io, json, sys
large, lines = json.load(sys.stdin)
results = []
for target, arguments in lines:
    module, _, function = target.partition(":")
    sys.argv = ["x", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = getattr(importlib.import_module(module), function)()
        except SystemExit as end:
            code = end.code
    results.append([arguments, code, out.getvalue(), err.getvalue(), [n for n in large if n in sys.modules]])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def decoys(tmp_path_factory):
    """A folder whose own files have the names of our packages, and raise."""
    folder = tmp_path_factory.mktemp("decoys")
    for name in ("train", "eval", "mllm", "vision_tower"):
        (folder / f"{name}.py").write_text("raise RuntimeError('the wrong file')\n")
    return folder


def run_all(lines, folder):
    """[arguments, exit code, stdout, stderr, large modules imported] of command lines, as console scripts run them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    asked = json.dumps([LARGE, [[SCRIPTS[command], arguments] for command, *arguments in lines]])
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN_ALL], input=asked, env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def help_lines():
    for command in SCRIPTS:
        yield command, "--help"
        yield command, "--version"
        for subcommand in SUBCOMMANDS.get(command, ()):
            yield command, subcommand, "--help"


def test_help_imports_nothing_large_and_shows_an_example(decoys):
    lines = list(help_lines())
    assert len(lines) > 20
    for (command, *arguments), result in zip(lines, run_all(lines, decoys), strict=True):
        _, code, out, err, large = result
        assert (code, err, large) == (0, "", []), result
        if arguments[-1] == "--version":
            assert out.split()[0] == command
        else:
            assert f"{command} {' '.join(arguments[:-1])}".strip() in out.partition("usage:")[2].partition("\n")[2]


CHAT = ["region-chat", "--image", ".", "--ask", "x"]
EVAL = ["region-eval", "run", "--task", "jsonl", "--data", ".", "--out", "x"]
USAGE_ERRORS = [
    (["region-chat"], "expected --image FILE"),
    (["region-chat", "--nonsense"], "--nonsense"),
    (["region-chat", "--image", "a.png", "--ask", "x"], "expected a region"),
    (["region-chat", "--image", "none.png", "--box=1,2,3,4", "--ask", "x"], "image not found: none.png"),
    (["region-chat", "--batch", "none.jsonl", "--output", "x"], "batch file not found: none.jsonl"),
    ([*CHAT, "--whole", "--model", "/none"], "expected a model directory or a hub id; directory not found: /none"),
    ([*CHAT, "--whole", "--model", "runs/my/model"], "directory not found: runs/my/model"),
    ([*CHAT, "--whole", "--model", "."], "expected a model directory, got . without a config.json"),
    ([*CHAT, "--whole", "--adapter", "none"], "adapter not found: none"),
    ([*CHAT, "--whole", "--alpha-weights", "none.pth"], "alpha weights not found: none.pth"),
    ([*CHAT, "--whole", "--max-new-tokens", "0"], "--max-new-tokens: expected 1 or more, got 0"),
    (["region-eval"], "expected a command, one of run, score"),
    (["region-eval", "task"], "did you mean 'tasks'"),
    ([*EVAL, "--strength", "2"], "expected a --strength from 0 to 1, got 2"),
    ([*EVAL, "--batch-size", "0"], "--batch-size: expected 1 or more, got 0"),
    ([*EVAL, "--limit", "-1"], "--limit: expected 1 or more, got -1"),
    ([*EVAL, "--max-new-tokens", "x"], "--max-new-tokens: expected an integer"),
    ([*EVAL, "--prompt", " "], "--prompt is empty"),
    ([*EVAL, "--metrics", "CIDER"], "expected metrics from literal_match, bleu_1"),
    ([*EVAL, "--metrics", "semantic_similarity"], "requires --sentence-model"),
    ([*EVAL, "--sentence-model", "none"], "sentence model not found: none"),
    ([*EVAL, "--model", "./none"], "directory not found: ./none"),
    (["region-eval", "score", ".", "--out", "x", "--metrics", "CIDER"], "expected metrics from literal_match"),
    (["region-eval", "run", "--task", "nonsense", "--data", ".", "--out", "x"], "unknown task 'nonsense'"),
    (["region-eval", "run", "--task", "jsonl", "--data", "none", "--out", "x"], "data not found: none"),
    (["region-eval", "run", "--task", "vg/own", "--data", "r.yaml", "--out", "x"], "got the file r.yaml"),
    (["region-eval", "score", "none.jsonl", "--out", "x"], "predictions not found: none.jsonl"),
    (["region-eval", "compare", "none", "none"], "run not found: none"),
    (["region-tune", "nonsense"], "unknown recipe 'nonsense'; expected a .yaml file, or one of blip2_flant5xl_lora"),
    (["region-tune", "shape_lora"], "unknown recipe 'shape_lora'; did you mean 'shapes_lora'?"),
    (["region-tune", "none.yaml"], "recipe not found, or not a file: none.yaml"),
    (["region-tune", "shapes_lora"], "required: --data"),
    (["region-tune", "shapes_lora", "--data", "none", "--output_dir", "x"], "data not found: none"),
    (["region-tune", "shapes_lora", "--lerning_rate", "1"], "unknown flags or values without a flag: --lerning_rate"),
    (["region-tune", "shapes_lora", "--learning_rate", "x"], "expected a finite number"),
    (["region-tune", "shapes_lora", "--max_steps", "x"], "expected an integer"),
    (["region-tune", "shapes_lora", "--optim", "x"], "invalid choice: 'x'"),
    (["region-tune", "shapes_lora", "--deepspeed", "x"], "deepspeed: expected one of zero1"),
    (["region-tune", "--data", ".", "--lora_r", "-1"], "lora_r: expected 0"),
    (["region-tune", "--data", ".", "--lora_alpha", "2"], "no effect without LoRA"),
    (["region-tune", "r.yaml"], "r.yaml: lora_r: expected one value, got a list"),
    (["region-tune", "null.yaml"], "null.yaml: turn_weights: expected a value, got null"),
    (["region-tune", "--data", ".", "--learning_rate", "-1"], "learning_rate: expected 0 or more, got -1.0"),
    (["region-tune", "--data", ".", "--model", "./none"], "directory not found: ./none"),
    (["region-tune", "--data", ".", "--alpha_weights", "none"], "alpha_weights not found: none"),
    (["region-tune", "--data", ".", "--optimizer", "none"], "optimizer: expected trainer or muon"),
    (["region-tune", "--data", ".", "--lora_r", "1", "--load_in", "3bit"], "load_in: expected 4bit or 8bit"),
    (["region-tune", "--data", ".", "--wordings", "none"], "wordings: expected one of own"),
    (["region-tune"], "required: --data; without a recipe all settings are given as flags; usage: "),
    (["alpha-clip"], "expected a command, one of convert, convert-lavis"),
    (["alpha-clip", "nonsense"], "invalid choice"),
    (["alpha-clip", "trian"], "did you mean 'train'"),
    (["alpha-clip", "--local_rank=1", "train", "shapes_lora"], "one of alpha_clip_b16"),
    (["alpha-clip", "train", "shapes_lora"], "one of alpha_clip_b16, alpha_clip_b16_paper"),
    (["alpha-clip", "train", "--geometry", "round", "--model", "M", "--data", "."], "geometry: expected one of crop"),
    (["alpha-clip", "convert", "none.pth", "OUT"], "alpha-clip convert: error: source not found: none.pth"),
    (["alpha-clip", "convert", "."], "required: OUT"),
    (["alpha-clip", "convert", ".", "OUT"], "expected a model directory, got . without a config.json"),
    (["alpha-clip", "convert", "r.yaml", "OUT.pth"], "expected a directory as OUT"),
    (["alpha-clip", "convert-lavis", "none.pth", "OUT", "--language-model", "x"], "checkpoint not found"),
    (["alpha-clip", "merge", "none", "OUT"], "adapter not found"),
    (["alpha-clip", "prepare", "vg", "--source", "none"], "source not found"),
    (["alpha-clip", "publish", "none", "a/b"], "folder not found"),
    (["alpha-clip", "plot", "none", "--out", "a.png"], "runs not found"),
    (["alpha-clip", "score", "--model", "x", "--data", "none"], "data not found"),
    (["alpha-clip", "attention-map", "--model", "x", "--image", "x.png", "--out", "x.png"], "image not found"),
    (["alpha-clip", "shapes", "--out", "x", "--images", "1", "--seed", "1", "--tars", "2"], "only with --layout grit"),
    (["alpha-clip", "shapes", "--out", "x", "--images", "0", "--seed", "1"], "--images: expected 1 or more, got 0"),
    (["alpha-clip", "score", "--model", "./x", "--data", "."], "directory not found: ./x"),
    (["alpha-clip", "merge", ".", "x", "--model", "./x"], "directory not found: ./x"),
    (["alpha-clip", "export", "./x", "x"], "directory not found: ./x"),
    (["alpha-clip", "publish", ".", "x"], "expected OWNER/NAME, got 'x'"),
]


# a region is read by numpy and PIL
MAP = ["alpha-clip", "attention-map", "--model", "x", "--image", ".", "--out", "x.png"]
REGION_ERRORS = [
    ([*CHAT, "--box", "1", "2", "3"], "expected 4 numbers, got 3"),
    ([*CHAT, "--box=1,2,3,x"], "'x'"),
    ([*CHAT, "--box-xywh=1,2,0,4"], "a width and height above 0"),
    ([*CHAT, "--nbox=0,0,500,500"], "expected fractions from 0 to 1"),
    ([*CHAT, "--points=1,2"], "expected @ and a size"),
    ([*CHAT, "--mask", "none.png"], "mask file not found: none.png"),
    ([*CHAT, "--rle", "none.json"], "'rle:none.json': No such file"),
    ([*CHAT, "--rle", "[]"], "has no segmentation"),
    ([*MAP, "--box=1,2,3"], "expected 4 numbers, got 3"),
    ([*MAP, "--box=1,2,3,4", "--mask", "none.png"], "mask file not found: none.png"),
]


@pytest.mark.parametrize(("errors", "allowed"), [(USAGE_ERRORS, ()), (REGION_ERRORS, ("numpy", "PIL"))])
def test_usage_errors_import_nothing_large(decoys, errors, allowed):
    (decoys / "r.yaml").write_text("data: .\nlora_r: [4]\n")
    (decoys / "null.yaml").write_text("data: .\nturn_weights: null\n")
    for (line, message), result in zip(errors, run_all([line for line, _ in errors], decoys), strict=True):
        _, code, out, err, large = result
        assert (code, out) == (2, "") and not set(large) - set(allowed), (line, result)
        assert err.count("\n") == 1 and message in err, (line, result)


@pytest.mark.parametrize("found_there", [False, True], ids=["console script", "PYTHONPATH"])
def test_a_folder_with_its_own_train_file(processes, decoys, found_there):
    """As DeepSpeed starts a command on other nodes, the folder is in PYTHONPATH; ours are behind it."""
    before = f"import sys; sys.path.append({str(ROOT)!r})"
    if found_there:
        before = f"import sys; sys.path[:0] = [{str(decoys)!r}]; sys.path.append({str(ROOT)!r})"
    for number, target in enumerate(("alpha_clip_commands.alpha_clip:main", "alpha_clip_commands.region_chat:main")):
        arguments = ["shapes", "--out", f"out{found_there}", "--images", 1, "--seed", 1]
        if number:
            arguments = ["--image", f"out{found_there}/VG_100K/1.png", "--box=1,1,2", "--ask", "x"]
        process = processes.run(target, arguments, cwd=decoys, before=before, checkout=False, check=not number)
        assert "wrong file" not in process.output()
        assert not number or (process.returncode == 2 and "expected 4 numbers" in process.output())


def test_shown_names_are_the_real_ones():
    from eval.region_matching import TOWER_VIEWS
    from mllm.convert.lavis_keys import VIT_L_BLOCKS
    from mllm.data import prepare
    from mllm.data.shapes import scenes, world
    from mllm.model_card import LICENSES
    from vision_tower.conversion import RELEASED_CHECKPOINTS
    from vision_tower.geometry import GEOMETRIES

    assert task_names.TASKS == tuple(TASKS)
    for file, name, value in (
        ("eval/region_matching.py", "TOWER_VIEWS", TOWER_VIEWS),
        ("mllm/model_card.py", "LICENSES", LICENSES),
        ("mllm/data/shapes/scenes.py", "SPLITS", scenes.SPLITS),
        ("mllm/data/prepare.py", "FILES", {**prepare.FILES}),
    ):
        assert list(source_values.constant(file, name)) == list(value)
    for file, name, value in (
        ("vision_tower/conversion.py", "RELEASED_CHECKPOINTS", RELEASED_CHECKPOINTS),
        ("vision_tower/geometry.py", "GEOMETRIES", GEOMETRIES),
        ("mllm/data/shapes/world.py", "MAX_OBJECTS", world.MAX_OBJECTS),
        ("mllm/convert/lavis_keys.py", "VIT_L_BLOCKS", VIT_L_BLOCKS),
    ):
        assert source_values.constant(file, name) == value
    with pytest.raises(LookupError, match="does not assign NOTHING"):
        source_values.constant("mllm/data/index.py", "NOTHING")


REGISTERED = """
import {package}
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_MAPPING
config = AutoConfig.for_model("alpha_clip")
assert MODEL_MAPPING[type(config)].__name__ == "AlphaCLIPModel"
assert "{package}" == "vision_tower" or AutoConfig.for_model("alpha_blip2") is not None
"""


@pytest.mark.parametrize("package", ["mllm", "vision_tower"])
def test_importing_a_package_registers_its_classes(processes, package):
    processes.run(REGISTERED.format(package=package))


def test_scripts_of_a_clone_run_their_subcommand(monkeypatch, capsys):
    text = re.compile(r"As `alpha-clip ([a-z-]+)`")
    scripts = {path: text.search(path.read_text("utf-8")) for path in sorted((ROOT / "scripts").glob("*.py"))}
    scripts = {path: found[1] for path, found in scripts.items() if found}
    assert scripts.keys()
    for path, subcommand in scripts.items():
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        assert end.value.code == 0 and f"usage: alpha-clip {subcommand} " in capsys.readouterr().out
