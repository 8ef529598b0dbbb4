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

from alpha_clip_commands import alpha_clip, evaluation, source_values
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


USAGE_ERRORS = [
    (["region-chat"], "expected --image FILE"),
    (["region-chat", "--nonsense"], "--nonsense"),
    (["region-chat", "--image", "a.png", "--ask", "x"], "expected a region"),
    (["region-chat", "--image", "none.png", "--box=1,2,3,4", "--ask", "x"], "image not found: none.png"),
    (["region-chat", "--batch", "none.jsonl", "--output", "x"], "batch file not found: none.jsonl"),
    (["region-eval"], "required"),
    (["region-eval", "run", "--task", "nonsense", "--data", ".", "--out", "x"], "unknown task 'nonsense'"),
    (["region-eval", "run", "--task", "jsonl", "--data", "none", "--out", "x"], "data not found: none"),
    (["region-eval", "score", "none.jsonl", "--out", "x"], "predictions not found: none.jsonl"),
    (["region-eval", "compare", "none", "none"], "run not found: none"),
    (["region-tune", "nonsense"], "unknown recipe 'nonsense'; expected a .yaml file, or one of blip2_flant5xl_lora"),
    (["region-tune", "none.yaml"], "recipe not found, or not a file: none.yaml"),
    (["region-tune", "shapes_lora"], "required: --data"),
    (["region-tune", "shapes_lora", "--data", "none", "--output_dir", "x"], "data not found: none"),
    (["region-tune", "shapes_lora", "--lerning_rate", "1"], "unknown flags or values without a flag: --lerning_rate"),
    (["region-tune", "shapes_lora", "--learning_rate", "x"], "expected a finite number"),
    (["region-tune", "shapes_lora", "--max_steps", "x"], "expected a whole number"),
    (["region-tune", "shapes_lora", "--optim", "x"], "invalid choice: 'x'"),
    (["region-tune", "shapes_lora", "--deepspeed", "x"], "deepspeed: expected one of zero1"),
    (["region-tune", "--data", ".", "--lora_r", "-1"], "lora_r: expected 0"),
    (["region-tune", "--data", ".", "--lora_alpha", "2"], "no effect without LoRA"),
    (["alpha-clip"], "required: COMMAND"),
    (["alpha-clip", "nonsense"], "invalid choice"),
    (["alpha-clip", "train", "shapes_lora"], "one of alpha_clip_b16, alpha_clip_b16_paper"),
    (["alpha-clip", "train", "--geometry", "round", "--model", "M", "--data", "."], "geometry: expected one of crop"),
    (["alpha-clip", "convert", "none.pth", "OUT"], "alpha-clip convert: error: source not found: none.pth"),
    (["alpha-clip", "convert", "."], "required: OUT"),
    (["alpha-clip", "convert", ".", "OUT.pth"], "OUT is a directory"),
    (["alpha-clip", "convert-lavis", "none.pth", "OUT", "--language-model", "x"], "checkpoint not found"),
    (["alpha-clip", "merge", "none", "OUT"], "adapter not found"),
    (["alpha-clip", "prepare", "vg", "--source", "none"], "source not found"),
    (["alpha-clip", "publish", "none", "a/b"], "folder not found"),
    (["alpha-clip", "plot", "none", "--out", "a.png"], "runs not found"),
    (["alpha-clip", "score", "--model", "x", "--data", "none"], "data not found"),
    (["alpha-clip", "attention-map", "--model", "x", "--image", "x.png", "--out", "x.png"], "image not found"),
    (["alpha-clip", "shapes", "--out", "x", "--images", "1", "--seed", "1", "--tars", "2"], "only with --layout grit"),
]


def test_usage_errors_import_nothing_large(decoys):
    for (line, message), result in zip(USAGE_ERRORS, run_all([line for line, _ in USAGE_ERRORS], decoys), strict=True):
        _, code, out, err, large = result
        assert (code, out, large) == (2, "", []) and err.count("\n") == 1 and message in err, (line, result)


@pytest.mark.parametrize("found_there", [False, True], ids=["console script", "PYTHONPATH"])
def test_a_folder_with_its_own_train_file(processes, decoys, found_there):
    """As DeepSpeed starts a command on other nodes, the folder is in PYTHONPATH; ours are behind it."""
    before = f"import sys; sys.path.append({str(ROOT)!r})"
    if found_there:
        before = f"import sys; sys.path[:0] = [{str(decoys)!r}]; sys.path.append({str(ROOT)!r})"
    for number, target in enumerate(("alpha_clip_commands.alpha_clip:main", "alpha_clip_commands.chat:main")):
        arguments = ["shapes", "--out", f"out{found_there}", "--images", 1, "--seed", 1]
        if number:
            arguments = ["--image", f"out{found_there}/VG_100K/1.png", "--box=1,1,2", "--ask", "x"]
        process = processes.run(target, arguments, cwd=decoys, before=before, checkout=False, check=not number)
        assert "wrong file" not in process.output()
        assert not number or (process.returncode == 2 and "expected 4 numbers" in process.output())


def test_shown_names_are_the_real_ones():
    from eval.region_text import VIEWS
    from mllm.blip2_conversion import VIT_L_BLOCKS
    from mllm.data import dataset_check, shapes, shapes_world
    from mllm.model_card import LICENCES
    from vision_tower.conversion import RELEASED_CHECKPOINTS
    from vision_tower.image_processing_alpha_clip import GEOMETRIES

    assert evaluation.TASKS == tuple(TASKS)
    for file, name, value in (
        ("eval/region_text.py", "VIEWS", VIEWS),
        ("mllm/model_card.py", "LICENCES", LICENCES),
        ("mllm/data/shapes.py", "SPLITS", shapes.SPLITS),
        ("mllm/data/dataset_check.py", "FILES", {**dataset_check.FILES}),
    ):
        assert list(source_values.constant(file, name)) == list(value)
    for file, name, value in (
        ("vision_tower/conversion.py", "RELEASED_CHECKPOINTS", RELEASED_CHECKPOINTS),
        ("vision_tower/image_processing_alpha_clip.py", "GEOMETRIES", GEOMETRIES),
        ("mllm/data/shapes_world.py", "MAX_OBJECTS", shapes_world.MAX_OBJECTS),
        ("mllm/blip2_conversion.py", "VIT_L_BLOCKS", VIT_L_BLOCKS),
    ):
        assert source_values.constant(file, name) == value
    with pytest.raises(LookupError, match="assigns nothing to NOTHING"):
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
