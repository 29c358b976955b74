"""Reads a source tree and says where it breaks the rules of docs/explanation/architecture.md.

Every rule is a function from a :class:`Tree` to a list of sentences; an empty list means that the rule holds. Nothing
is imported or run, so the rules also hold for modules whose dependencies are not installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "softprompts"

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"__main__"}),
    frozenset({"cli"}),
    frozenset({"studies", "server", "bench"}),
    frozenset({"baselines", "evaluation"}),
    frozenset({"training", "transfer", "inference", "integrations"}),
    frozenset({"prompted", "storage"}),
    frozenset({"tasks", "models", "prompts", "pretraining"}),
    frozenset({"cache_folder", "config", "folder_lock", "registry", "types"}),
    frozenset({"errors"}),
)
"""The picture, top line first. Imports go down only; units on one line never import each other."""

BANNED_NAMES = frozenset({"utils", "util", "common", "helpers", "helper", "misc"})
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
"""Without the docstring, which nobody should be tempted to shorten."""


@dataclass(frozen=True)
class Module:
    """One parsed file."""

    name: str
    path: Path
    source: str
    is_package: bool
    tree: ast.Module = field(repr=False)

    @property
    def unit(self) -> str:
        """The second part of the dotted name: the box of the picture that the module belongs to."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else ""


@dataclass(frozen=True)
class Import:
    """One module that another one imports."""

    target: str
    line: int
    typing_only: bool


Tree = dict[str, Module]


def read_tree(src: Path) -> Tree:
    """Parse every module below ``src``."""
    modules: Tree = {}
    for path in sorted(src.rglob("*.py")):
        parts = list(path.relative_to(src).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        source = path.read_text(encoding="utf-8")
        modules[name] = Module(name, path.relative_to(src), source, is_package, ast.parse(source, filename=str(path)))
    return modules


def imports_of(module: Module, modules: Tree) -> list[Import]:
    """List what ``module`` imports of the package, also inside functions and below ``TYPE_CHECKING``."""
    found = []
    for node, typing_only in _walk(module.tree.body, typing_only=False):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            # `from package import module` means the module where there is one.
            joined = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in modules else base for name in joined]
        else:
            continue
        found += [Import(t, node.lineno, typing_only) for t in targets if t.split(".")[0] == PACKAGE]
    return found


def _walk(body: Iterable[ast.AST], typing_only: bool) -> Iterator[tuple[ast.AST, bool]]:
    for node in body:
        yield node, typing_only
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _walk(node.body, typing_only=True)
            yield from _walk(node.orelse, typing_only)
        else:
            yield from _walk(ast.iter_child_nodes(node), typing_only)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def layer_of(unit: str) -> int | None:
    """Return the line of the picture that ``unit`` stands on, counted from the top."""
    return next((i for i, layer in enumerate(LAYERS) if unit in layer), None)


def layer_violations(modules: Tree) -> list[str]:
    """Imports go down only."""
    wrong = []
    for module in modules.values():
        if not module.unit:
            continue  # the package itself: checked by its own rule below
        own = layer_of(module.unit)
        if own is None:
            wrong.append(f"{module.path}: unit '{module.unit}' has no place in the picture; give it one in LAYERS")
            continue
        for item in imports_of(module, modules):
            unit = item.target.partition(".")[2].split(".")[0]
            if unit == module.unit or (not unit and _takes_only_version(module, item.line)):
                continue
            if not unit:
                wrong.append(f"{module.path}:{item.line} imports from the package itself; import from the unit")
                continue
            other = layer_of(unit)
            if other is None or other <= own:
                wrong.append(f"{module.path}:{item.line} '{module.unit}' imports '{unit}', which is not below it")
    return wrong


def _takes_only_version(module: Module, line: int) -> bool:
    return any(
        isinstance(node, ast.ImportFrom) and node.lineno == line and {a.name for a in node.names} == {"__version__"}
        for node in ast.walk(module.tree)
    )


def eager_root_imports(modules: Tree) -> list[str]:
    """``import softprompts`` loads nothing of the package."""
    root = modules[PACKAGE]
    return [f"{root.path}:{i.line} imports {i.target}" for i in imports_of(root, modules) if not i.typing_only]


def import_cycles(modules: Tree) -> list[str]:
    """No module imports itself through others (imports for type checking alone are left out)."""
    graph = {
        name: sorted({i.target for i in imports_of(module, modules) if not i.typing_only and i.target in modules})
        for name, module in modules.items()
    }
    cycles: list[str] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            cycles.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in graph[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return cycles


def relative_imports(modules: Tree) -> list[str]:
    """Imports are absolute."""
    return [
        f"{module.path}:{node.lineno} imports relatively"
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def long_files(modules: Tree) -> list[str]:
    """A file has at most MAX_FILE_LINES lines."""
    lengths = {module.path: len(module.source.splitlines()) for module in modules.values()}
    return [f"{path} has {lines} lines" for path, lines in lengths.items() if lines > MAX_FILE_LINES]


def long_functions(modules: Tree) -> list[str]:
    """A function has at most MAX_FUNCTION_LINES lines, its docstring not counted."""
    wrong = []
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = _lines(node) - (_lines(node.body[0]) if ast.get_docstring(node) else 0)
                if lines > MAX_FUNCTION_LINES:
                    wrong.append(f"{module.path}:{node.lineno} '{node.name}' has {lines} lines")
    return wrong


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def banned_names(modules: Tree) -> list[str]:
    """A module's name says what is in it."""
    return [f"{m.path}: say what it is for" for m in modules.values() if BANNED_NAMES & set(m.name.split("."))]


def local_imports(modules: Tree) -> list[str]:
    """Imports stand at the top of a module, except in the command line, whose verbs load what is heavy."""
    return [
        f"{module.path}:{node.lineno} imports inside '{function.name}'"
        for module in modules.values()
        if module.unit != "cli"
        for function in ast.walk(module.tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]


def export_violations(modules: Tree) -> list[str]:
    """``__all__`` names exactly what a module defines in public (a package: or re-exports); ruff keeps it sorted."""
    wrong = []
    for module in modules.values():
        exported = _exported(module.tree)
        public = _defined(module.tree)
        reexported = _imported_names(module.tree) if module.is_package else set()
        if exported is None:
            if public or reexported:
                wrong.append(f"{module.path} has no __all__ of plain strings")
            continue
        for name in sorted(public - set(exported)):
            wrong.append(f"{module.path} defines '{name}' and does not list it in __all__; list it or name it _{name}")
        for name in sorted(set(exported) - public - reexported):
            wrong.append(f"{module.path} lists '{name}' in __all__ and does not define it")
        if len(exported) != len(set(exported)):
            wrong.append(f"{module.path} lists a name twice in __all__")
    return wrong


def _exported(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if _annotated(node) else []
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets) and isinstance(node.value, ast.List):
            items = [item.value for item in node.value.elts if isinstance(item, ast.Constant)]
            return [item for item in items if isinstance(item, str)]
    return None


def _annotated(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign)


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in _top_level(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and not _is_type_variable(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return {name for name in names if not name.startswith("_")} | ({"__version__"} & names)


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _top_level(node.body)
            yield from _top_level(getattr(node, "orelse", []))


def _is_type_variable(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in {"TypeVar", "ParamSpec"}


def _imported_names(tree: ast.Module) -> set[str]:
    return {
        alias.asname or alias.name
        for node in _top_level(tree.body)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE
        for alias in node.names
    }


def empty_tests(modules: Tree) -> list[str]:
    """Every test can fail: it asserts something that is not a constant, or expects an error or a warning."""
    wrong = []
    for module in modules.values():
        for node in ast.walk(module.tree):
            is_test = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test")
            if is_test and not any(_can_fail(inner) for inner in ast.walk(node)):
                wrong.append(f"{module.path}:{node.lineno} '{node.name}' cannot fail")
    return wrong


def _can_fail(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func).split(".")[-1].lstrip("_")
    return name in {"raises", "warns", "fail"} or name.startswith(("assert", "check", "expect"))
