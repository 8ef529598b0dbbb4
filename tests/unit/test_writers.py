"""Files are written by mllm/files.py. Other code that writes files is listed here, with the reason."""

import ast

import pytest

from tests.unit.test_style import PACKAGES, ROOT, python_files

# file -> calls that may write, and why nothing of somebody else's can be lost
ALLOWED = {
    "mllm/files.py": "the one place",
    "mllm/folders.py": "the same, for folders",
    "mllm/locks.py": "the lock of an output, and what its dead holder left",
    "mllm/overlay.py": {"save"},  # through replacing_file
    "mllm/data/shapes/visual_genome_layout.py": {"save"},  # into a folder of replacing_folder
    "mllm/data/shapes/grit_layout.py": {"save", "write_bytes"},  # the same; PNG into memory
    "vision_tower/mask_decoding.py": {"save"},  # into memory
    "mllm/convert/export.py": {"save_pretrained", "save_torch_state_dict"},  # into a folder of replacing_folder
    "mllm/fused.py": {"save_pretrained"},  # the same
    "mllm/remote_code.py": {"write_text"},  # part of save_pretrained, also in exported code
    "eval/page.py": {"save"},  # into memory
    "scripts/shapes/build_embedded_model.py": {"save", "copy", "save_pretrained"},  # into claimed folders
    "scripts/shapes/build_blip2.py": {"save_pretrained"},
    "scripts/shapes/build_clip.py": {"save_pretrained"},
    "mllm/publish.py": {"copytree"},  # into a folder of replacing_folder, or a temporary one
    # into a folder of replacing_folder; the original layout into work_folder and replacing_file
    "mllm/convert/alpha_clip.py": {"save", "replace", "save_file", "save_pretrained"},
    "mllm/convert/lavis.py": {"save", "save_pretrained"},
    "mllm/convert/merge.py": {"save_pretrained"},
    "scripts/bench/alpha_clip.py": {"save", "write_text"},  # temporary folders
    "scripts/bench/finetune.py": {"save", "write_text"},
    "scripts/bench/llava_7b.py": {"rmtree", "save_file", "save_pretrained"},  # temporary, or a claimed folder
    "scripts/bench/index.py": {"open"},  # into a claimed folder
    "eval/predictions.py": {"open"},
    "train/trainer.py": {"rmtree"},
    "train/output.py": {"rmtree"},  # checkpoints of the same run
    "train/run.py": {"save", "save_pretrained"},
    "train/contrastive/trainer.py": {"write_text"},
}
_OF_SHUTIL = ("rmtree", "copy", "copy2", "copytree", "copyfile", "move")
_WRITERS = {
    *("write_text", "write_bytes", "rename", "save", "dump", "savez", "tofile", "touch"),
    *("save_pretrained", "save_file", "save_torch_state_dict"),
}


def writes(source):
    """The calls in a file that may write: (name, line)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
        owner = getattr(getattr(function, "value", None), "id", None)
        if name in ("open", "fdopen"):
            modes = [
                word.value
                for word in [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
                if isinstance(word, ast.Constant) and isinstance(word.value, str)
            ]
            if owner != "tarfile" and any(set(mode) & set("wax+") and len(mode) <= 3 for mode in modes):
                found.append((name, node.lineno))
        elif name in _WRITERS or (owner, name) == ("os", "replace") or (owner == "shutil" and name in _OF_SHUTIL):
            found.append((name, node.lineno))
    return found


def test_only_listed_code_writes_files():
    wrong = []
    for path in python_files(*PACKAGES):
        name = path.relative_to(ROOT).as_posix()
        allowed = ALLOWED.get(name, set())
        if isinstance(allowed, set):
            found = writes(path.read_text("utf-8"))
            wrong += [
                f"{name}:{line}: {call}; use mllm.files, or say here why not"
                for call, line in found
                if call not in allowed
            ]
            wrong += [f"{name}: {call} is allowed but not called" for call in allowed - {call for call, _ in found}]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        'open(path, "w")',
        'open(path, mode="ab")',
        'path.open("w")',
        "path.write_text(x)",
        "shutil.rmtree(x)",
        "os.replace(a, b)",
        "image.save(path)",
        "path.rename(x)",
        "json.dump(x, f)",
    ],
)
def test_a_new_writer_is_found(source):
    assert writes(source)
    assert not writes('open(path, encoding="utf-8"); text.replace("a", "b"); tarfile.open(path)')
