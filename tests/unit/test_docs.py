"""The documentation agrees with the code: each command is accepted by the real parsers, each name in a Python block or
code span exists, each link leads somewhere, and numbers equal those in committed files.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import math
import re
import runpy
import shlex
import sys
import tomllib

import pytest
import yaml
from safetensors import safe_open

from alpha_clip_commands import alpha_clip, region_chat, region_eval
from alpha_clip_commands.command_line import ArgumentParser
from alpha_clip_commands.training import programs
from eval.tasks import TASKS
from mllm.loading import EMBEDDED_MODEL
from tests.doc_pages import PAGES, README, ROOT, Block, blocks, commands, inline_code, rows, without_environment
from tests.files import read_json
from vision_tower.conversion import RELEASED_CHECKPOINTS

OURS = ("alpha_clip_commands", "vision_tower", "mllm", "eval", "train")
SHELL = ("git", "cd", "source")  # not run
LAUNCHER_FLAGS = {"--nproc_per_node": 1, "--nproc-per-node": 1, "--hostfile": 1}  # flag -> number of values
OTHER_FLAGS = ("--no_python", "--no-python", "--module", "--vision_tower")  # of launchers and the original LLaVA
PLACEHOLDERS = {"RECIPE": "llava_7b_lora_vg"}
NOT_INSTALLED = ("llava",)  # the original code base
PARSERS = {"region-chat": region_chat, "region-eval": region_eval, "alpha-clip": alpha_clip}
TRAINING = {("region-tune",): programs.TUNE, ("alpha-clip", "train"): programs.TRAIN_ALPHA_CLIP}
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]


def check_command(words, monkeypatch):
    """Raise AssertionError, ValueError or SystemExit unless a command could run, given its files."""
    words = [PLACEHOLDERS.get(word, word) for word in without_environment(words)]
    program, *rest = words
    if program in ("torchrun", "deepspeed"):
        check_command(launched(rest), monkeypatch)
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1])
    elif program == "python":
        check_script(monkeypatch, *rest)
    elif program == "make":
        for target in rest:
            assert "=" in target or re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE), target
    elif program == "pip":
        (wanted,) = re.findall(r"\[(.*)\]", rest[-1])
        assert set(wanted.split(",")) <= EXTRAS.keys()
    elif program == "pytest":
        assert (ROOT / rest[0]).exists(), rest[0]
    elif training := TRAINING.get(tuple(words[:2])) or TRAINING.get(tuple(words[:1])):
        # the files of the examples do not exist
        monkeypatch.setattr(programs, "check_found", lambda *_: None)
        monkeypatch.setattr(programs, "check_model", lambda *_: None)
        programs.check(training, words[words.index("train") + 1 :] if "train" in words[:2] else rest)
    elif program in PARSERS:
        PARSERS[program].build_parser().parse_args(rest)
    else:
        assert program in SHELL or (ROOT / program).is_file(), program


def launched(words):
    """The command without the launcher and its flags."""
    while (flag := words.pop(0)) not in ("--no_python", "--no-python"):
        del words[: LAUNCHER_FLAGS[flag]]
    return words


class Parsed(BaseException):
    """Raised when a script has parsed its arguments."""


def check_script(monkeypatch, path, *words):
    """Run a script until it has parsed its arguments."""
    parse_args, parse_known_args = ArgumentParser.parse_args, ArgumentParser.parse_known_args

    def stop(*arguments):
        monkeypatch.setattr(ArgumentParser, "parse_known_args", parse_known_args)  # parse_args and subcommands use it
        parse_args(*arguments)
        raise Parsed

    def stop_and_keep_recipe_flags(*arguments):
        recipe_flags = parse_known_args(*arguments)[1]
        assert set(recipe_flags[::2]) <= flags()
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(ArgumentParser, "parse_known_args", stop_and_keep_recipe_flags)
    monkeypatch.setattr(sys, "argv", [path, *words])
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    before = set(sys.modules)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / path), run_name="__main__")
    for name in set(sys.modules) - before:  # scripts that it imports by their short names
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "scripts")):
            del sys.modules[name]


def flags():
    """The flags of all commands, scripts and launchers."""
    parsers = [module.build_parser() for module in PARSERS.values()]
    parsers += [programs.build_parser(program) for program in TRAINING.values()]
    found = {*LAUNCHER_FLAGS, *OTHER_FLAGS}
    while parsers:
        parser = parsers.pop()
        found.update(parser._option_string_actions)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers.extend(action.choices.values())
    for script in (ROOT / "scripts").rglob("*.py"):
        found.update(re.findall(r'"(--[a-z_-]+)"', script.read_text("utf-8")))
    return found


@pytest.mark.parametrize(("page", "words"), list(commands()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_command_is_accepted(page, words, monkeypatch):
    check_command(words, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "region-chat --image a.png --boxes 1,2,3,4",
        "region-eval run --task shapes-caption --data DIR",
        "alpha-clip convert-clip A B",
        "alpha-clip train alpha_clip_l14 --model CLIP --data DIR --output_dir OUT --no_such_key 1",
        "torchrun --nproc_per_node 8 --no-python region-tune no_such_recipe --data DIR --output_dir OUT",
        "python scripts/bench/tower.py --pair-count 5",
        "python scripts/no_such_script.py",
        "make no-such-target",
        "pip install 'alpha-clip-mllm[no_such_extra]'",
        "no-such-program",
    ],
)
def test_a_wrong_command_is_noticed(command, monkeypatch):
    with pytest.raises((AssertionError, SystemExit, ValueError, FileNotFoundError, pytest.fail.Exception)):
        check_command(shlex.split(command), monkeypatch)


@pytest.mark.parametrize(
    "code",
    [
        "from mllm import NoSuchClass",
        "import mllm\nmllm.no_such_function()",
        "import mllm\nmllm.load(no_such_argument=1)",
        "import no_such_package",
    ],
)
def test_a_wrong_python_block_is_noticed(code):
    with pytest.raises((AssertionError, AttributeError)):
        test_names_and_arguments_in_a_python_block_exist(Block("page", 1, "python", code))


def test_commands_in_the_text_are_accepted(monkeypatch):
    checked = 0
    for page, code in inline_code():
        words = code.split()
        complete = not {"...", "RECIPE", "PATH"} & set(words) and "[" not in code
        if words[0] in ("python", "make", "pytest") and complete and "-m" not in words:
            check_command(shlex.split(code), monkeypatch)
        elif words[0] == "alpha-clip" and len(words) > 1:
            assert words[1] in alpha_clip.SUBCOMMANDS or words[1] == "train", f"{page}: {code}"
        else:
            continue
        checked += 1
    assert checked > 20


def test_flags_in_the_text_exist():
    known = flags()
    for page, code in inline_code():
        if code.startswith(("--", "region-", "alpha-clip ")):
            for flag in re.findall(r"(?<!\S)--[a-z_-]+", code):
                assert flag in known, f"{page}: {flag}"


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.name)
def test_names_and_arguments_in_a_python_block_exist(block):
    """Imports, attributes of imported modules, and keyword arguments of calls."""
    tree = ast.parse(block.text)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = imported(alias.name, bool(alias.asname))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = imported(node.module)
                names[alias.asname or alias.name] = None if module is None else getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolve(node, names)
        elif isinstance(node, ast.Call) and (function := resolve(node.func, names)) is not None:
            check_keywords(function, {keyword.arg for keyword in node.keywords} - {None})


def imported(name, leaf=True):
    """A module of this project or of Transformers; None for other modules, which only have to be installed."""
    root = name.partition(".")[0]
    if root in (*OURS, "transformers"):
        module = importlib.import_module(name)
        return module if leaf else importlib.import_module(root)
    assert root in NOT_INSTALLED or importlib.util.find_spec(root), f"{root} is not installed"
    return None


def resolve(node, names):
    """The value of an expression of names and attributes; None if it is only known at run time."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := resolve(node.value, names)) is not None:
        return getattr(owner, node.attr)
    return None


def check_keywords(function, keywords):
    """Fail if a function of this project does not have an argument."""
    if getattr(function, "__module__", "").partition(".")[0] not in OURS:
        return
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        assert keywords <= {parameter.name for parameter in parameters}, function


def test_names_of_our_packages_in_the_text_exist():
    checked = 0
    for page, code in inline_code():
        if match := re.fullmatch(rf"((?:{'|'.join(OURS)})(?:\.\w+)+)(?:\(.*\))?", code):
            if match[1].endswith((".py", ".yaml", ".json", ".md")) or "changelog" in page.lower():
                continue  # a file, or a former name
            assert exists(match[1]), f"{page}: {code}"
            checked += 1
    assert checked > 10


def exists(dotted):
    """Whether a module or an attribute of a module exists."""
    module, _, attribute = dotted.rpartition(".")
    if importlib.util.find_spec(module.partition(".")[0]) and module_there(dotted):
        return True
    return module_there(module) and hasattr(importlib.import_module(module), attribute)


def module_there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_files_in_the_text_exist():
    checked = 0
    for page, code in inline_code():
        path = code.partition("::")[0].rstrip("/")
        if re.fullmatch(rf"(?:{'|'.join(OURS)}|scripts|tests|docs)/[\w./*-]+", path) and page != "CHANGELOG.md":
            assert list(ROOT.glob(path)), f"{page}: {code}"
            checked += 1
    assert checked > 30


def anchors(text):
    """The anchors that GitHub creates for the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file.read_text("utf-8")), f"{page}: {target}"


def test_every_page_is_in_the_index():
    pages = {name for name in PAGES if name.startswith("docs/")}
    assert pages <= set(re.findall(r"\]\(([^)#]+)", README))


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/") or page == "README.md"])
def test_a_page_begins_with_something_to_run(page):
    assert "```" in "\n".join(PAGES[page].splitlines()[:25])


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


# numbers


@pytest.mark.parametrize("page", ["docs/shapes.md", "mllm/assets/model/README.md"])
def test_scores_are_those_of_the_file(page):
    scores = read_json(EMBEDDED_MODEL / "scores.json")
    table = {row[0]: row[1:] for row in rows(page)}
    for name, entry in scores["shipped"].items():
        before, baseline = scores["without the CLIP"][name]["score"], entry.get("blind")
        shown = [f"{entry['score']:.1%}", f"{before:.1%}", str(entry["of"]), f"{baseline:.1%}" if baseline else ""]
        assert table[name] == shown


def test_the_readme_repeats_the_pages():
    for page, names in (
        ("docs/evaluation.md", {"the sample's own region": 2, "the whole image": 2, "no image": 2}),
        ("docs/ablations.md", {"alpha, our training recipe": 2, "alpha, released training recipe": 2}),
        ("docs/ablations.md", {"cropping (CLIP)": 2, "a red circle (CLIP)": 2}),
        ("docs/ablations.md", {"blurring everything else (CLIP)": 2, "masking everything else with gray (CLIP)": 2}),
    ):
        there = [row[1:] for row in rows(page)]
        for row in rows("README.md"):
            if row[0] in names:
                assert any(set(row[1:]) <= set(cells) for cells in there), row


def test_released_checkpoints_are_those_of_the_converter():
    table = RELEASED_CHECKPOINTS.partition("\n\n")[0]
    expected = [row for row in rows("", table) if ".pth" in row[0]]
    assert [row for row in rows("docs/weights.md") if ".pth" in row[0]] == expected and len(expected) == 8
    assert len(set(re.findall(r"https://drive\.google\.com/file/d/([\w-]+)", PAGES["docs/weights.md"]))) == 8


def test_protocols_have_the_items_of_the_tasks():
    for name, items, *_ in (row for row in rows("docs/evaluation.md") if row[0] in TASKS and len(row) == 4):
        number = re.match(r"[\d,]+", items)
        assert TASKS[name].items == (int(number[0].replace(",", "")) if number else None), name


def test_human_performance_is_the_published_rows():
    published = yaml.safe_load((ROOT / "eval" / "published.yaml").read_text("utf-8"))
    people = published["RefCOCOg"][0]
    text = " ".join(PAGES["docs/evaluation.md"].split())
    assert f"METEOR {people['meteor']} and CIDEr {people['cider']}" in text and "human" in people["system"]


def test_parameters_are_those_of_the_embedded_model():
    (table,) = (block.text for block in blocks("") if block.text.startswith("part "))
    parts = {}
    for line in table.splitlines()[1:]:
        name, *numbers = line.replace(",", "").split()
        parts[name] = [int(number) for number in numbers if number != "-"]
    with safe_open(EMBEDDED_MODEL / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    total = sum(math.prod(shape) for shape in shapes)
    frozen, lora, trained = parts.pop("all")
    assert frozen + trained == total and f"{total / 1e6:.1f} M parameters" in " ".join(README.split())
    assert sum(sum(numbers) for numbers in parts.values()) == frozen + lora + trained


@pytest.mark.parametrize(
    ("row", "key", "paper", "ours"),
    [
        ("label smoothing", "label_smoothing_factor", 0.1, 0),
        ("regions per image in a batch", "regions_per_image", 1, 4),
        ("weight decay", "weight_decay", 0.02, 0.02),
        ("warmup", "warmup_steps", 800, 0.05),
    ],
)
def test_the_table_of_settings_is_that_of_the_recipes(row, key, paper, ours):
    """The columns of `alpha_clip_*_paper` and `alpha_clip_*`."""
    cells = next(cells for cells in rows("docs/alpha_clip.md") if cells[0] == row)
    for size in ("b16", "l14", "l14_336"):
        for column, suffix, value in ((3, "_paper", paper), (4, "", ours)):
            recipe = yaml.safe_load((ROOT / "train" / "recipes" / f"alpha_clip_{size}{suffix}.yaml").read_text("utf-8"))
            assert recipe.get(key, 0) == value
            shown = {0.05: "5%", 800: "800 steps", 0: "0"}.get(value, str(value))
            assert cells[column].startswith(shown)


def test_the_table_of_tuning_settings_is_that_of_the_recipes():
    """LoRA's rank and the learning rates, of `llava_7b_paper` and `llava_7b_lora_vg`."""
    cells = {row[0]: row[1:] for row in rows("docs/training.md") if len(row) == 4}
    paper, lora = (
        yaml.safe_load((ROOT / "train" / "recipes" / f"llava_7b_{name}.yaml").read_text("utf-8"))
        for name in ("paper", "lora_vg")
    )
    assert cells["language model"][2] == f"LoRA r {lora['lora_r']}, {lora['learning_rate']:.0e}".replace("e-0", "e-")
    (projector,) = lora["learning_rates"]
    assert projector.startswith("multi_modal_projector=")
    assert f"{float(projector.partition('=')[2]):.0e}".replace("e-0", "e-") in cells["projector"][2]
    assert f"{paper['learning_rate']:.0e}".replace("e-0", "e-") in cells["learning rate, epochs, batch"][1]
    assert f"{paper['num_train_epochs']} epoch" in cells["learning rate, epochs, batch"][1]
    assert f"r {lora['lora_r']}, alpha {lora['lora_alpha']}" in PAGES["docs/training.md"]


def test_the_citation_and_the_issue_templates_are_readable():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert (str(citation["version"]), citation["license"]) == (project["version"], project["license"])
    for template in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml")):
        form = yaml.safe_load(template.read_text("utf-8"))
        assert {"name", "description", "body"} <= form.keys()
        assert all("attributes" in field for field in form["body"])
