"""Mutations of a source file: small changes, each of which should change a result.

Docstrings and other texts, annotations, decorators, `raise` statements, and calls that only log, print or show progress
are not mutated.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_COMPARISONS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "is": "is not", "is not": "is", "in": "not in", "not in": "in",
}  # fmt: skip
_ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "**": "*", "|": "&", "&": "|", "@": "*"}
_OPPOSITES = {"min": "max", "minimum": "maximum", "any": "all", "floor": "ceil", "argmin": "argmax"}
_OPPOSITES |= {value: key for key, value in _OPPOSITES.items()}
# Functions and methods that only print, log or configure output.
_TALK = {"print", "warn", "debug", "info", "warning", "error", "tqdm", "say", "say_error", "set_description"}
_TALK |= {"filterwarnings", "set_verbosity_error", "disable_progress_bar", "progress.update"}
_ORDERED = {"isinstance", "issubclass", "hasattr", "getattr"}  # swapped arguments raise TypeError
_TEXTS = {"__repr__", "__str__", "to_text"}
# Keyword arguments that do not change a result: texts, and checks that only replace one error by another.
_SILENT = {"help", "metavar", "metadata", "description", "desc", "unit", "prog", "strict", "encoding", "disable"}
_SILENT |= {"stacklevel", "category", "formatter_class", "label"}


class Mutation(NamedTuple):
    """A replacement of the characters from `start` to `end` of a file."""

    file: str
    function: str
    line: int
    source: str
    operator: str
    start: int
    end: int
    old: str
    new: str
    number: int = 0  # among equal changes of equal lines in the same function

    @property
    def name(self) -> str:
        """A name that does not depend on the line number."""
        return f"{self.file}::{self.function}::{self.source}::{self.operator}::{self.number}"

    def applied(self, text: str) -> str:
        """The mutated file."""
        return text[: self.start] + self.new + text[self.end :]


def mutations_of(file: str, text: str) -> list[Mutation]:
    """All mutations of a source file, in order. Each compiles and differs from the original."""
    finder = _Finder(file, text)
    finder.visit(ast.parse(text))
    found, seen = [], {}
    for mutation in sorted(finder.found, key=lambda m: (m.start, m.end, m.operator)):
        changed = mutation.applied(text)
        try:
            compile(changed, file, "exec", dont_inherit=True)
        except (SyntaxError, ValueError):  # a `not` where the syntax does not allow it
            continue
        if changed != text:
            number = seen[mutation.name] = seen.get(mutation.name, -1) + 1
            found.append(mutation._replace(number=number))
    return found


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.lines = text.splitlines(keepends=True)
        self.offsets = [0]
        for line in self.lines:
            self.offsets.append(self.offsets[-1] + len(line))
        self.function: list[str] = []
        self.returns: list[ast.expr | None] = []
        self.found: list[Mutation] = []

    # positions

    def at(self, line: int, column: int) -> int:
        """Character offset in the text of a position that `ast` gives as a line and byte offset."""
        return self.offsets[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def part(self, node: ast.AST) -> str:
        return self.text[slice(*self.span(node))]

    def add(self, operator: str, start: int, end: int, new: str) -> None:
        line = self.text.count("\n", 0, start) + 1
        where = ".".join(self.function) or "<module>"
        source, old = self.lines[line - 1].strip(), self.text[start:end]
        self.found.append(Mutation(self.file, where, line, source, operator, start, end, old, new))

    def replace(self, operator: str, node: ast.AST, new: str) -> None:
        self.add(operator, *self.span(node), new)

    def between(self, operator: str, left: ast.AST, right: ast.AST, swaps: dict[str, str]) -> None:
        """Replace the operator between two nodes."""
        start, end = self.span(left)[1], self.span(right)[0]
        words = "|".join(sorted((re.escape(word) for word in swaps), key=len, reverse=True))
        gap = re.sub(r"#[^\n]*", lambda comment: " " * len(comment[0]), self.text[start:end])
        if match := re.search(rf"(?<![\w]){words}(?![\w])" if swaps is _WORDS else words, gap):
            self.add(operator, start + match.start(), start + match.end(), swaps[match[0]])

    # not mutated

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr | ast.Assert):
            return
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:  # noqa: N802
        if node.name in _TEXTS:
            return
        self.function.append(node.name)
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        self.returns.append(node.returns)
        self.body(node.body)
        self.returns.pop()
        self.function.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:  # noqa: N802
        self.function.append(node.name)
        self.body(node.body)
        self.function.pop()

    def body(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:  # noqa: N802
        if node.value is not None:
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:  # noqa: N802
        test = ast.unparse(node.test)
        if "__name__" in test or "TYPE_CHECKING" in test:
            return
        self.negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:  # noqa: N802
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:  # noqa: N802
        self.negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for condition in node.ifs:
            self.replace("condition of a comprehension dropped", condition, "True")
        self.generic_visit(node)

    def negate(self, test: ast.expr) -> None:
        if not isinstance(test, ast.Compare | ast.UnaryOp) or len(getattr(test, "ops", [0])) > 1:
            self.replace("condition negated", test, f"(not ({self.part(test)}))")

    # operators

    def visit_Compare(self, node: ast.Compare) -> None:  # noqa: N802
        places = [node.left, *node.comparators]
        for left, right in zip(places, places[1:], strict=False):
            self.between("comparison swapped", left, right, _COMPARISONS)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:  # noqa: N802
        if not any(isinstance(side, ast.JoinedStr) or _is_text(side) for side in (node.left, node.right)):
            self.between("arithmetic swapped", node.left, node.right, _ARITHMETIC)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:  # noqa: N802
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between("and/or swapped", left, right, _WORDS)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:  # noqa: N802
        if isinstance(node.op, ast.Not):
            self.replace("not removed", node, f"({self.part(node.operand)})")
        elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.replace("sign removed", node, f"({self.part(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:  # noqa: N802
        if isinstance(node.value, bool):
            self.replace("constant changed", node, str(not node.value))
        elif isinstance(node.value, int | float):
            for sign in "+-":
                self.replace(f"number {sign} 1", node, f"({self.part(node)} {sign} 1)")

    def visit_Slice(self, node: ast.Slice) -> None:  # noqa: N802
        for bound, sign in ((node.lower, "+"), (node.upper, "-")):
            if bound is not None:
                self.replace("slice off by one", bound, f"({self.part(bound)}) {sign} 1")
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:  # noqa: N802
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.replace("return of a neutral value", node.value, self.neutral(node.value))
        self.generic_visit(node)

    def neutral(self, value: ast.expr) -> str:
        annotation = ast.unparse(self.returns[-1]) if self.returns and self.returns[-1] is not None else ""
        if annotation == "bool":
            return f"not ({self.part(value)})"
        kind = annotation.partition("[")[0]
        return {"str": '""', "list": "[]", "dict": "{}", "int": "0", "float": "0.0", "set": "set()"}.get(kind, "None")

    def visit_AugAssign(self, node: ast.AugAssign) -> None:  # noqa: N802
        self.replace("statement deleted", node, "pass")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:  # noqa: N802
        if isinstance(node.value, ast.Constant) or (isinstance(node.value, ast.Call) and _talks(node.value)):
            return
        if isinstance(node.value, ast.Call):
            self.replace("statement deleted", node, "pass")
        self.generic_visit(node)

    # calls

    def visit_Call(self, node: ast.Call) -> None:  # noqa: N802
        if _talks(node):
            return
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _OPPOSITES:
            end = self.span(node.func)[1]
            self.add("min/max swapped", end - len(name), end, _OPPOSITES[name])
        pairs = [] if name in _ORDERED else zip(node.args, node.args[1:], strict=False)
        for left, right in pairs:
            if type(left) is type(right) and isinstance(left, ast.Name | ast.Attribute | ast.Subscript):
                (start, _), (_, end) = self.span(left), self.span(right)
                middle = self.text[self.span(left)[1] : self.span(right)[0]]
                self.add("arguments swapped", start, end, self.part(right) + middle + self.part(left))
        for keyword in node.keywords:
            if keyword.arg is not None and keyword.arg not in _SILENT:
                self.drop(keyword, self.span(node)[1])
        self.visit(node.func)
        for child in [*node.args, *(k.value for k in node.keywords if k.arg not in _SILENT)]:
            self.visit(child)

    def drop(self, keyword: ast.keyword, call_end: int) -> None:
        """Remove a keyword argument and the comma before or after it."""
        start, end = self.span(keyword)
        if behind := re.match(r"\s*,[ ]?", self.text[end:call_end]):
            end += behind.end()
        elif before := re.search(r",\s*\Z", self.text[:start]):
            start = before.start()
        self.add("keyword argument dropped", start, end, "")


_WORDS = {"and": "or", "or": "and"}


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


def _talks(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in _TALK or ast.unparse(call.func) in _TALK


def python_files(root: str, packages: tuple[str, ...]) -> Iterator[str]:
    """Source files of the packages, relative to `root`, without the copies saved with the embedded model."""
    for package in packages:
        for path in sorted(Path(root, package).rglob("*.py")):
            if "assets" not in path.parts:
                yield path.relative_to(root).as_posix()
