"""The plan of the package: sizes, the order of imports, and docstrings that keep their promises."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

import steerkit

PACKAGE = Path(steerkit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# The order of the road: a room imports only from rooms before it.
ORDER = (
    "errors",
    "_support",
    "prompts",
    "model",
    "tokens",
    "network",
    "activations",
    "maths",
    "vector",
    "dictionary",
    "methods",
    "composition",
    "steering",
    "generation",
    "fitting",
    "evaluate",
    "monitor",
    "export",
    "tuning",
    "report",
    "persona",
    "recipe",
    "evidence",
    "checks",
    "serve",
    "engines",
    "cli",
    "__main__",
)
LONGEST_MODULE, MEDIAN_MODULE, LONGEST_FUNCTION = 400, 130, 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def dotted(path: Path) -> str:
    """A file's name as it is imported, without the package's: ``tokens.scope``; a room's own file is the room."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}
named = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def imports(path: Path, *, nested: bool) -> Iterator[str]:
    """The modules of the package that a file imports; those for type checking alone are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree) if nested else tree.body:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "steerkit":
            home = (node.module or "").removeprefix("steerkit").removeprefix(".")
            for name in node.names:
                inner = f"{home}.{name.name}".removeprefix(".")
                yield inner if inner in MODULES else home
        elif isinstance(node, ast.Import):
            yield from (name.name.removeprefix("steerkit.") for name in node.names if name.name.startswith("steerkit."))


def test_every_file_has_its_place_in_the_order() -> None:
    assert {name.split(".")[0] for name in MODULES} - {""} <= set(ORDER)


@named
def test_imports_run_one_way(path: Path) -> None:
    own = dotted(path).split(".")[0]
    if not own:
        return
    for name in imports(path, nested=True):
        other = name.split(".")[0]
        assert not other or ORDER.index(other) <= ORDER.index(own), f"{own} imports {name}, which comes later"


def test_no_module_imports_itself_by_a_detour() -> None:
    # A room's own file names what is inside for others; the files inside do not import it.
    graph = {name: {other for other in imports(path, nested=False) if other} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        if name:
            visit(name, ())


def test_modules_are_short() -> None:
    lengths = {dotted(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    too_long = {name: length for name, length in lengths.items() if length > LONGEST_MODULE}
    assert not too_long, f"longer than {LONGEST_MODULE} lines, so ask whether they hold two ideas: {too_long}"
    assert statistics.median(lengths.values()) <= MEDIAN_MODULE


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Every function of a file, with the class it is in."""

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield prefix + child.name, child
                yield from inside(child, f"{prefix}{child.name}.<inside>.")
            elif isinstance(child, ast.ClassDef):
                yield from inside(child, f"{prefix}{child.name}.")
            else:
                yield from inside(child, prefix)

    return inside(ast.parse(path.read_text(encoding="utf-8")), "")


def length(function: Function) -> int:
    """Lines of a function, signature included, docstring not."""
    first = function.body[0]
    is_doc = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    doc = (first.end_lineno or 0) - first.lineno + 1 if is_doc else 0
    return (function.end_lineno or 0) - function.lineno + 1 - doc


@named
def test_functions_are_short(path: Path) -> None:
    too_long = {name: length(function) for name, function in functions(path) if length(function) > LONGEST_FUNCTION}
    assert not too_long, f"longer than {LONGEST_FUNCTION} lines: {too_long}"


def public_functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Functions that a user of the package may call: no underscore in their name or in that of their class."""
    for name, function in functions(path):
        if "<inside>" not in name and not any(part.startswith("_") for part in name.split(".")):
            yield name, function


def raised(function: Function) -> set[str]:
    """Names of the errors that a function's own body raises, those of functions inside it left out."""
    found = set()
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, Function | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found.add(node.exc.func.id)
        waiting += ast.iter_child_nodes(node)
    return {name for name in found if name.endswith("Error") and not name.startswith("_")} - {"NotImplementedError"}


def test_the_reading_of_raise_statements() -> None:
    code = (
        "def f():\n"
        "    def g():\n"
        "        raise SiteError('x')\n"
        "    try:\n"
        "        raise DataError('x')\n"
        "    except E:\n"
        "        raise\n"
    )
    function = ast.parse(code).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert raised(function) == {"DataError"}


@named
def test_every_error_that_a_public_function_raises_is_listed(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0] == "cli":
        return  # commands end with a message and a code; what they raise is for `main` alone
    missing = {}
    for name, function in public_functions(path):
        listed = (ast.get_docstring(function) or "").partition("Raises:")[2]
        unlisted = {error for error in raised(function) if f"{error}:" not in listed}
        # A general entry covers its kinds, as `SteerError: see fit` does.
        if unlisted and "SteerError:" not in listed:
            missing[name] = sorted(unlisted)
    assert not missing


def takes_tensors(function: Function) -> bool:
    """Whether a tensor stands in a function's signature."""
    arguments = function.args
    annotations = [argument.annotation for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    texts = [ast.unparse(annotation) for annotation in (*annotations, function.returns) if annotation is not None]
    return any(re.search(r"\bTensor\b", text) and "Callable" not in text for text in texts)


SHAPE = re.compile(r"\[[a-z0-9_+*, .]*\]|scalar|any shape|state dict|shape", re.IGNORECASE)


def declared_with_shapes() -> set[str]:
    """What every method may override: its shapes stand where it is declared."""
    homes = (path for path in (PACKAGE / "methods").glob("_*.py"))
    return {
        name.split(".")[-1]
        for home in homes
        for name, function in public_functions(home)
        if "." in name and SHAPE.search(ast.get_docstring(function) or "")
    }


@named
def test_every_public_function_with_a_tensor_gives_shapes(path: Path) -> None:
    inherited = declared_with_shapes() if path.parent.name == "methods" else set()
    without = [
        name
        for name, function in public_functions(path)
        if takes_tensors(function)
        and not SHAPE.search(ast.get_docstring(function) or "")
        and not re.match(r"(As|See) `", ast.get_docstring(function) or "")  # documented where it is declared
        and name.split(".")[-1] not in inherited
    ]
    assert not without, f"shapes, such as [b, t, d], are missing in the docstrings of {without}"


def test_no_docstring_waits_to_be_written() -> None:
    assert [dotted(path) for path in FILES if "TODO" in path.read_text(encoding="utf-8")] == []


def test_no_exported_function_bears_the_name_of_a_module_beside_it() -> None:
    for path in FILES:
        if path.name != "__init__.py" or path.parent in (PACKAGE, PACKAGE / "report" / "plots"):
            continue
        beside = {entry.stem for entry in path.parent.iterdir() if entry.suffix == ".py" or entry.is_dir()}
        exported = {
            name.asname or name.name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("steerkit.")
            for name in node.names
            if f"{dotted(path)}.{name.name}" not in MODULES
        }
        assert not beside & exported, f"steerkit.{dotted(path)}: {sorted(beside & exported)}"
