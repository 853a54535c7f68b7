"""The package has layers ("rooms"): a module imports only from its own and from those below."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import spectrafm_cli
import spectrafm_hf
from spectrafm_hf import moved


PACKAGE = Path(spectrafm_hf.__file__).parent
#: From the bottom up. Modules beside the rooms are rooms of their own.
ROOMS = (
    *("lazy", "moved", "files", "free_text", "statistics"),
    *("models", "auto", "checkpoints", "data", "synthesis", "inference", "hub", "training", "show"),
)
MODULES = {
    ".".join(("spectrafm_hf", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if "resources" not in path.parts
}


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(module: str, path: Path) -> set[str]:
    """Modules of the package that a module imports, also within its functions."""
    parents = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    never_run = {inner for node in tree.body if _is_for_types(node) for inner in ast.walk(node)}
    for node in set(ast.walk(tree)) - never_run:
        if isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*start, *filter(None, [node.module])])
            for name in node.names:
                full = f"{source}.{name.name}"
                found.add(full if full in MODULES else source)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name in MODULES and name != module}


GRAPH = {module: imports(module, path) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"spectrafm_hf"}))
def test_a_module_imports_from_its_room_and_from_those_below(module):
    height = {f"spectrafm_hf.{room}": i for i, room in enumerate(ROOMS)}
    room = ".".join(module.split(".")[:2])
    for other in GRAPH[module] - {"spectrafm_hf"}:
        assert height[".".join(other.split(".")[:2])] <= height[room], f"{module} imports {other}"
    if module.startswith("spectrafm_hf.models."):  # a checkpoint carries it
        assert all(other.startswith("spectrafm_hf.models.") for other in GRAPH[module])


def test_no_module_imports_itself_by_way_of_others():
    for module in GRAPH:
        found, waiting = set(), [module]
        while waiting:
            new = GRAPH[waiting.pop()] - found
            found |= new
            waiting += new
        assert module not in found


@pytest.mark.parametrize("old", moved.MOVED)
def test_an_import_by_an_old_name_works_with_a_warning(old):
    sys.modules.pop(f"spectrafm_hf.{old}", None)
    with pytest.warns(FutureWarning, match=f"spectrafm_hf.{old} is called spectrafm_hf.{moved.MOVED[old][0]}.* now"):
        module = importlib.import_module(f"spectrafm_hf.{old}")
    for new in moved.MOVED[old]:
        home = importlib.import_module(f"spectrafm_hf.{new}")
        own = next(name for name, value in vars(home).items() if getattr(value, "__module__", "") == home.__name__)
        assert getattr(module, own) is getattr(home, own)
    with pytest.raises(AttributeError, match=f"has no attribute 'nothing'; it is spectrafm_hf.{moved.MOVED[old][0]}"):
        module.nothing  # noqa: B018


def test_old_modules_are_packages_with_the_same_names():
    from spectrafm_hf.hub import push, upload
    from spectrafm_hf.training import Recipe, recipe, train, trainer

    assert push is upload.push and Recipe is recipe.Recipe and train is trainer.train
    with pytest.raises(ModuleNotFoundError, match="No module named 'spectrafm_hf.nothing'"):
        importlib.import_module("spectrafm_hf.nothing")


#: The model reads from top to bottom, as in transformers.
LONG_FILES = {"modeling_spectrafm.py"}
MOST_LINES, MOST_LINES_OF_FUNCTION = 500, 80
SOURCES = [*PACKAGE.rglob("*.py"), *Path(spectrafm_cli.__file__).parent.rglob("*.py")]


def test_no_file_is_longer_than_500_lines():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name for name, lines in lengths.items() if lines > MOST_LINES} <= LONG_FILES


def test_no_function_is_longer_than_80_lines():
    """Without its docstring."""
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                lines = node.end_lineno - first.lineno + 1
                if lines > MOST_LINES_OF_FUNCTION:
                    long.append((path.name, node.name))
    assert not long


@pytest.mark.parametrize("package", ["spectrafm_hf", "spectrafm_hf.models", "spectrafm_hf.data"])
def test_lazily_imported_names_exist(package):
    module = importlib.import_module(package)
    assert len(module.__all__) > 5
    assert all(hasattr(module, name) for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018
