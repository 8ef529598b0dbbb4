"""The wheel contains every file, and its commands run in another environment and folder."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.files import ROOT

PACKAGES = ("alpha_clip_commands", "vision_tower", "mllm", "eval", "train")
NOT_SHIPPED = ("scripts", "tests")
SCRIPTS_FOLDER = "Scripts" if os.name == "nt" else "bin"
SCENE = "mllm/assets/scenes/scene_1.png"
# Written beside the console scripts, so that Python finds modules for it exactly as it does for them; it runs them all
# in one process, as each would take seconds to import the same.
RUN_ALL = f"""
import contextlib, importlib.util, io, json, runpy, sys
results = [[importlib.util.find_spec(name).origin for name in {PACKAGES}]]
for sys.argv in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            code = runpy.run_path(sys.argv[0], run_name="__main__") and None
        except SystemExit as end:
            code = end.code
    results.append([code, output.getvalue()])
print(json.dumps(results))
"""


def files_of(folder):
    """Paths of the files in a folder, relative to its parent, without bytecode."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder.parent).as_posix() for path in paths}


def run(command, **options):
    """Run a command that must succeed, and return its standard output."""
    # PYTHONPATH would make this checkout importable.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, encoding="utf-8", timeout=120, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources, because a stale build/lib would be included."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in (*PACKAGES, *NOT_SHIPPED):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # The build dependencies are in [dev], so nothing is downloaded.
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run([sys.executable, "-m", "pip", "wheel", *flags, "--wheel-dir", out, source])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new environment with the wheel and the dependencies of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / SCRIPTS_FOLDER / Path(sys.executable).name
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    run([sys.executable, "-m", "pip", "--python", python, *install])
    # Python ignores .pth files in a folder that a .pth file adds, so an editable install is not found.
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages,) = {path.parent for path in folder.rglob("vision_tower")}
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder with other packages called eval and train, which must not be imported."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("eval", "train", "mllm", "vision_tower"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_is_in_the_wheel(wheel, package):
    on_disk = files_of(ROOT / package)
    assert f"{package}/__init__.py" in on_disk
    missing = on_disk - set(zipfile.ZipFile(wheel).namelist())
    assert not missing, f"not in the wheel (a folder without __init__.py, or package-data): {sorted(missing)}"


def test_nothing_else_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert {name for name in folders if not name.endswith(".dist-info")} == set(PACKAGES)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.fixture(scope="module")
def results(wheel, environment, elsewhere):
    """The locations of the packages, then exit code and output of each command in `command_lines`."""
    probe = environment / SCRIPTS_FOLDER / "run_all.py"
    probe.write_text(RUN_ALL, encoding="utf-8")
    python = environment / SCRIPTS_FOLDER / Path(sys.executable).name
    return json.loads(run([python, probe], cwd=elsewhere, input=json.dumps(command_lines(wheel, environment))))


def command_lines(wheel, environment):
    """Version and help of each command, and a question about a scene."""
    lines = []
    for command in console_scripts(wheel):
        program = str(environment / SCRIPTS_FOLDER / command)
        subcommand = ["run"] if command == "region-eval" else []
        lines += [[program, "--version"], [program, *subcommand, "--help"]]
    (scene,) = environment.rglob(SCENE)
    asked = ["--nbox", "0.25,0.25,0.75,0.75", "--ask", "What is this?", "--json", "--device", "cpu"]
    return [*lines, [str(environment / SCRIPTS_FOLDER / "region-chat"), "--image", str(scene), *asked]]


@pytest.mark.slow
def test_packages_come_from_the_wheel(environment, results):
    for name, origin in zip(PACKAGES, results[0], strict=True):
        assert Path(origin).is_relative_to(environment), f"{name} comes from {origin}"


@pytest.mark.slow
def test_commands_run_from_another_folder(wheel, results):
    commands = console_scripts(wheel)
    assert commands == ["alpha-clip", "region-chat", "region-eval", "region-tune"]
    for command, version, help_text in zip(commands, results[1:-1:2], results[2:-1:2], strict=True):
        assert version[0] in (0, None) and version[1].split() == [command, wheel.name.split("-")[1]]
        shown = {"region-tune": "--lora_r", "alpha-clip": "convert-lavis"}.get(command, "--device")
        assert help_text[0] in (0, None) and shown in help_text[1]


@pytest.mark.slow
def test_question_about_a_scene(results):
    code, output = results[-1]
    assert not code and json.loads(output)["answer"].strip()


def console_scripts(wheel):
    """The commands that the wheel installs."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(archive.read(name).decode())
    return list(parser["console_scripts"])
