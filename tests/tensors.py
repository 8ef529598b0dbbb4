"""Tensors of parity fixtures, and comparisons of state dicts."""

import torch
from safetensors.torch import load_file

from tests.files import ROOT

FIXTURES = ROOT / "tests" / "parity" / "data"


def fixture_tensors(name, prefix="checkpoint."):
    """The tensors of a parity fixture whose names start with a prefix, under their names without it."""
    return tensors_under(prefix, load_file(FIXTURES / name))


def tensors_under(prefix, tensors):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def same_tensors(first, second):
    """Whether two dicts have the same names and bit-identical tensors."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def changed_tensors(before, after):
    """The names of the tensors that differ between two dicts with the same names."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
