"""Damaged and hostile files of weights: an error of one line that names the file and the tensor, soon and in little
memory.
"""

import json
import re
import resource
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from alpha_clip_commands import alpha_clip
from mllm.convert import lavis_keys
from tests.tensors import fixture_tensors
from vision_tower import conversion, weight_files

BLOCK = "transformer.resblocks.1"
LAYER = "Qformer.bert.encoder.layer"


@pytest.fixture
def original():
    """A checkpoint in the original layout: 2 blocks, width 128."""
    return fixture_tensors("alpha_clip_original.safetensors")


@pytest.fixture
def lavis():
    """A stage-2 checkpoint of LAVIS without a tower: 3 Q-Former layers of width 64."""
    return fixture_tensors("lavis_blip2.safetensors")


def refusal(read, *args):
    """The one-line message of the ValueError that `read` raises within 2 seconds of CPU time and 1 GB."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError) as caught:
        read(*args)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


def renamed(old, new):
    def damage(tensors):
        for key in [key for key in tensors if key.startswith(old)]:
            tensors[new + key.removeprefix(old)] = tensors.pop(key)

    return damage


def blocks(count):
    return lambda tensors: tensors.update({f"transformer.resblocks.{i}.x": torch.zeros(1) for i in range(count)})


# damage, what the message names
KINDS = {
    "float8": (put("proj", lambda t: t.to(torch.float8_e4m3fn)), "proj.*float8"),
    "int8": (put("ln_pre.bias", lambda t: t.to(torch.int8)), "ln_pre.bias.*int8"),
    "bool": (put("ln_pre.bias", lambda t: t > 0), "ln_pre.bias.*bool"),
    "complex": (put("conv1.weight", lambda t: t.to(torch.complex64)), "conv1.weight.*complex"),
    "0-d": (put("class_embedding", lambda t: torch.tensor(1.0)), r"class_embedding of shape .*got \(\)"),
    "0-d proj": (put("proj", lambda t: torch.tensor(1.0)), r"matrix proj.*got \(\)"),
    "empty": (put("ln_post.weight", lambda t: t[:0]), r"ln_post.weight.*got \(0,\)"),
    "empty convolution": (put("conv1.weight", lambda t: t[:0]), "not empty, got width 0"),
    "empty patches": (put("conv1.weight", lambda t: t[..., :0]), "not empty.*patch 0"),
    "empty positions": (put("positional_embedding", lambda t: t[:0]), "positional_embedding"),
    "empty mlp": (put("transformer.resblocks.0.mlp.c_fc.weight", lambda t: t[:0]), "0 in mlp.c_fc"),
    "empty projection": (put("proj", lambda t: t[:, :0]), "0 in proj"),
    "many dimensions": (put("proj", lambda t: torch.zeros([0] * 60)), "proj"),
    "nan": (put("conv1_alpha.weight", lambda t: t * torch.nan), "conv1_alpha.weight contains NaN"),
    "infinity": (put(f"{BLOCK}.ln_1.bias", lambda t: t - torch.inf), f"{BLOCK}.ln_1.bias contains NaN or Inf"),
    "huge block": (renamed(f"{BLOCK}.", "transformer.resblocks.99999999999."), f"lacks {BLOCK}"),
    "endless block": (renamed(f"{BLOCK}.", f"transformer.resblocks.{'9' * 5000}."), f"lacks {BLOCK}"),
    "negative block": (renamed(f"{BLOCK}.", "transformer.resblocks.-1."), f"lacks {BLOCK}"),
    "zero-padded block": (renamed(f"{BLOCK}.", "transformer.resblocks.01."), f"lacks {BLOCK}"),
    "other digits": (renamed(f"{BLOCK}.", "transformer.resblocks.\u0661."), f"lacks {BLOCK}"),
    "gap": (renamed(f"{BLOCK}.", "transformer.resblocks.2."), f"lacks {BLOCK}"),
    "no blocks": (renamed("transformer.", "transformers."), "matrix transformer.resblocks.0"),
    "word for a block": (renamed(f"{BLOCK}.", "transformer.resblocks.x."), f"lacks {BLOCK}"),
    "too many blocks": (blocks(conversion.MAX_BLOCKS + 1), "301 blocks transformer.resblocks.*at most 300"),
    "two spellings": (put(f"{BLOCK}.attn.in_proj_bias", lambda t: torch.zeros(384)), "two names of one tensor"),
    "other prefix": (renamed("", "clip.model."), r"expected an original Alpha-CLIP .*clip\.model"),
    "one prefix": (renamed("proj", "module.proj"), r"mixes names .*module\.proj"),
    "newline": (put("a\nb", lambda t: torch.zeros(1)), r"more than .*'a\\nb'"),
    "long name": (put("a" * 9000, lambda t: torch.zeros(1)), r"more than .*aaa\.\.\."),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_tensors_that_are_no_tower(original, tmp_path, kind, ending):
    damage, named = KINDS[kind]
    damage(original)
    file = tmp_path / f"weights.{ending}"
    torch.save(original, file) if ending == "pth" else save_file(original, file)
    message = refusal(conversion.read_tower, file)
    assert str(file) in message and re.search(named, message)


PICKLED = {
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "proj, got a quantized"),
    "sparse": (lambda: torch.ones(4, 4).to_sparse(), "proj, got a torch.sparse_coo"),
    "sparse rows": (lambda: torch.ones(4, 4).to_sparse_csr(), "proj, got a torch.sparse_csr"),
    "meta": (lambda: torch.empty(10**12, device="meta"), "proj, got a meta"),
    "expanded": (lambda: torch.ones(1, 1).expand(10**6, 10**6), "proj of shape .* larger than its stored data"),
    "nested": (lambda: {"weight": torch.ones(1)}, "proj: dict"),
    "list": (lambda: [torch.ones(1)], "proj: list"),
    "none": (lambda: None, "proj: NoneType"),
    "number": (lambda: 1.5, "proj: float"),
    "text": (lambda: "weights", "proj: str"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # from torch, about beta formats
@pytest.mark.parametrize("kind", PICKLED)
def test_what_only_torch_can_save(original, tmp_path, kind):
    make, named = PICKLED[kind]
    file = tmp_path / "weights.pth"
    for prefix in ("", "visual."):
        torch.save({**original, prefix + "proj": make()}, file)
        message = refusal(conversion.read_tower, file)
        assert str(file) in message and re.search(named, message)


@pytest.mark.parametrize(
    "content", [None, 3, [torch.ones(1)], torch.ones(2), {3: torch.ones(1)}, {("a",): torch.ones(1)}, {None: None}]
)
def test_what_is_no_dict_of_names(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    assert "expected named tensors in" in refusal(conversion.read_tower, tmp_path / "weights.pth")
    torch.save({"model": content}, tmp_path / "weights.pth")
    assert "expected named tensors under 'model'" in refusal(lavis_keys.read_lavis, tmp_path / "weights.pth")


def text(words):
    return b"X" + len(words).to_bytes(4, "little") + words.encode()


def number(value):
    length = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)


def tensor_pickle(stored=4, shape=(4,), strides=(1,), offset=0):
    """{"w": a float32 tensor} as pickled by torch.save, with a storage that states `stored` values."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(stored) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides))
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes
    return b"\x80\x02}" + text("w") + call + b"\x89ccollections\nOrderedDict\n)RtRs."


def archive(path, pickled, storage=bytes(16), compression=zipfile.ZIP_STORED, **more):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "data/0": storage, **more}.items():
            file.writestr(f"archive/{name}", content)
        file.writestr("archive/version", b"3\n")
    return path


def tuples_of_tuples(depth):
    """A dict key of sixty nested tuples, each with two references to the previous one: hashing it takes years."""
    steps = (b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(depth))
    return b"\x80\x02})q\x00" + b"".join(steps) + b"Ns."


ARCHIVES = {
    "storage larger than its file": tensor_pickle(10**9, (10**9,)),
    "storage larger than memory": tensor_pickle(2**60, (2**60,)),
    "storage larger than a number": tensor_pickle(2**70, (2**70,)),
    "stride": tensor_pickle(4, (4,), (2**62,)),
    "negative stride": tensor_pickle(4, (4,), (-1,)),
    "negative shape": tensor_pickle(4, (-4,)),
    "offset": tensor_pickle(4, (4,), (1,), 2**40),
    "expanded": tensor_pickle(4, (2**40,), (0,)),
    "bytearray": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "tensor of any size": b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.",
    "code": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "code by a stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93X\x04\x00\x00\x00true\x85R.",
    "memo": b"\x80\x02]r\xff\xff\xff\x1f.",
    "tuples of tuples": tuples_of_tuples(60),
    "nested marks": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "long": b"\x80\x02" + b"N" * 3_900_000 + b".",
    "longer": b"\x80\x02" + b"N" * 4_100_000 + b".",
    "long number": b"\x80\x02\x8b\xff\xff\x00\x00" + b"\x7f" * 65535 + b".",
    "underflow": b"\x80\x02\x86\x86\x86.",
    "no mark": b"\x80\x02Nt.",
    "unknown memo": b"\x80\x02h\x07.",
    "unfinished": b"\x80\x02}" + text("w"),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_hostile_archives(tmp_path, kind):
    file = archive(tmp_path / "weights.pth", ARCHIVES[kind])
    assert str(file) in refusal(weight_files.read_tensors, file)


def test_the_archive_itself_is_good(tmp_path):
    read = weight_files.read_tensors(archive(tmp_path / "weights.pth", tensor_pickle()))
    assert read["w"].tolist() == [0, 0, 0, 0]


def test_members_of_an_archive(tmp_path):
    file = tmp_path / "weights.pth"
    archive(file, tensor_pickle(), compression=zipfile.ZIP_DEFLATED)
    assert "is compressed (archive/data.pkl)" in refusal(weight_files.read_tensors, file)
    archive(file, tensor_pickle(), **{"constants.pkl": b"x"})
    assert "TorchScript archive" in refusal(weight_files.read_tensors, file)
    archive(file, tensor_pickle(), **{f"more/{n}": b"" for n in range(2 * weight_files.MAX_TENSORS)})
    assert "members; expected at most" in refusal(weight_files.read_tensors, file)
    archive(file, tensor_pickle(), **{"inner/data.pkl": b"x"})
    assert "expected one data.pkl" in refusal(weight_files.read_tensors, file)
    archive(file, tensor_pickle())
    whole = file.read_bytes()
    claimed = whole.replace(b"data/0", b"data/9")
    file.write_bytes(claimed)
    assert "damaged" in refusal(weight_files.read_tensors, file)


def test_more_tensors_than_a_model_has(tmp_path):
    shared = torch.zeros(1)
    torch.save({f"w{n}": shared.view(1) for n in range(weight_files.MAX_TENSORS + 1)}, tmp_path / "weights.pth")
    assert "at most 5,000" in refusal(weight_files.read_tensors, tmp_path / "weights.pth")


def test_tensors_that_share_a_storage_do_not_unfold_without_end(tmp_path):
    shared = torch.zeros(100_000)
    torch.save({"a": shared, "tied": shared}, tmp_path / "tied.pth")
    assert len(weight_files.read_tensors(tmp_path / "tied.pth")) == 2
    torch.save({f"w{n}": shared for n in range(100)}, tmp_path / "weights.pth")
    assert "more than 2 times its size" in refusal(weight_files.read_tensors, tmp_path / "weights.pth")


def test_each_flipped_byte_of_the_weights_is_found(original, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(original, file)
    whole = file.read_bytes()
    place = whole.index(original["proj"].numpy().tobytes()) + 5
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert "checksum of" in refusal(conversion.read_tower, file)


def test_files_of_older_versions_are_refused(original, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(original, file, _use_new_zipfile_serialization=False)
    assert "before torch 1.6" in refusal(conversion.read_tower, file)


def safetensors(path, header, content=bytes(16)):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)
    return path


def entry(shape=(4,), end=16, dtype="F32", start=0):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "list": [],
    "no tensors": {"w": 3},
    "other type": {"w": entry(dtype="F33")},
    "shape": {"w": entry([2**62, 2])},
    "product too large": {"w": entry([2**63, 2], 0)},
    "large and empty": {"w": entry([2**64 - 1, 0], 0)},
    "offsets": {"w": entry([4], 2**40)},
    "reversed": {"w": entry([4], 0, start=16)},
    "overlap": {"w": entry(), "v": entry()},
    "negative": {"w": entry([-4])},
    "text": {"w": entry("4")},
    "deep": b"[" * 100_000,
    "surrogate": b'{"\\ud800": {}}',
    "not UTF-8": b'{"\xff": {}}',
    "nothing": b"",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_hostile_headers(tmp_path, kind):
    file = safetensors(tmp_path / "w.safetensors", HEADERS[kind])
    assert str(file) in refusal(conversion.read_tower, file)


def test_headers_have_a_limit(tmp_path):
    file = tmp_path / "w.safetensors"
    many = {f"w{n}": entry([0], 0) for n in range(weight_files.MAX_TENSORS + 1)}
    assert "contains 5,001 tensors" in refusal(conversion.read_tower, safetensors(file, many, b""))
    assert "header of" in refusal(conversion.read_tower, safetensors(file, b" " * 5_000_000))
    for size in range(9):
        file.write_bytes(b"\xff" * size)
        assert "truncated" in refusal(conversion.read_tower, file)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (put("query_tokens", lambda t: t.to(torch.float8_e5m2)), "query_tokens.*float8"),
        (put("query_tokens", lambda t: t[:, :0]), "query_tokens"),
        (put("query_tokens", lambda t: t[..., :0]), "query_tokens"),
        (put("t5_proj.weight", lambda t: torch.tensor(1.0)), r"t5_proj.weight .*got \(\)"),
        (put(f"{LAYER}.0.intermediate_query.dense.weight", lambda t: t[:0]), "query_tokens|intermediate"),
        (renamed(f"{LAYER}.2.", f"{LAYER}.99999999999."), rf"lacks {LAYER}\.2"),
        (renamed(f"{LAYER}.2.", f"{LAYER}.02."), rf"lacks {LAYER}\.2"),
        (renamed(f"{LAYER}.2.", f"{LAYER}.-2."), rf"lacks {LAYER}\.2"),
        (renamed(f"{LAYER}.1.", f"{LAYER}.3."), rf"lacks {LAYER}\.1"),
        (renamed(f"{LAYER}.0.", f"{LAYER}.3."), rf"{LAYER}\.0"),
        (put("ln_vision.bias", lambda t: t + torch.inf), "ln_vision.bias contains NaN or Inf"),
    ],
)
def test_lavis_checkpoints(lavis, original, tmp_path, damage, named, capsys):
    torch.save(original, tmp_path / "alpha.pth")
    damage(lavis)
    file = tmp_path / "lavis.pth"
    torch.save({"model": lavis, "epoch": 9, "scaler": {"scale": 65536.0}}, file)
    tower = conversion.read_tower(tmp_path / "alpha.pth")
    assert re.search(named, refusal(lambda: lavis_keys.from_lavis(lavis_keys.read_lavis(file), tower, 1)))


@pytest.mark.parametrize("shape", [(), (128,), (128, 3), (0, 3, 8, 8), (128, 0, 8, 8), (128, 3, 8, 8, 1)])
def test_convolution_of_the_tower_in_a_lavis_checkpoint(lavis, shape):
    lavis |= {"visual_encoder.conv1.weight": torch.zeros(shape), "visual_encoder.class_embedding": torch.zeros(128)}
    assert "the tower (visual_encoder.*)" in refusal(lavis_keys.from_lavis, lavis, None, 0)


def test_a_mistake_of_our_own_is_not_taken_for_damage(original, tmp_path, monkeypatch):
    torch.save(original, tmp_path / "weights.pth")
    monkeypatch.setattr(weight_files, "_check_members", lambda *_: len(None))
    with pytest.raises(TypeError):
        conversion.read_tower(tmp_path / "weights.pth")
    monkeypatch.undo()
    monkeypatch.setattr(weight_files, "_check_sizes", lambda *_: len(None))
    with pytest.raises(TypeError):
        conversion.read_tower(tmp_path / "weights.pth")


def test_converters_name_the_file(original, lavis, tmp_path, capsys):
    del original["proj"]
    torch.save(original, tmp_path / "alpha.pth")
    assert alpha_clip.main(["convert", str(tmp_path / "alpha.pth"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "alpha.pth") in error and "proj" in error and error.count("\n") == 1
