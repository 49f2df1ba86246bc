"""The arrows of docs/architecture.md: packages keep apart, no import runs in a circle, and GPU machines need no slide library."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "models", "data", "training", "metrics")
FORBIDDEN = {
    "common": {"models", "data", "training", "metrics"},
    "models": {"data", "training", "metrics"},
    "data": {"models", "training", "metrics"},
    "training": {"data", "metrics"},
    "metrics": {"models", "data", "training"},
}


def modules() -> dict[str, Path]:
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for package in PACKAGES:
        found |= {f"{package}.{path.stem}": path for path in (ROOT / package).glob("*.py")}
    return found


def imports_of(path: Path) -> set[str]:
    """Our modules that a file imports, as dotted names (a package stands for its __init__)."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    known = modules()
    ours = {name for name in names if name in known}
    return ours | {f"{name}.__init__" for name in names if name in PACKAGES and name == "models"}


MODULES = modules()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_packages_stay_apart(name):
    package = name.split(".")[0]
    reached = {imported.split(".")[0] for imported in imports_of(MODULES[name])}
    assert not reached & FORBIDDEN.get(package, set())


def test_imports_have_no_cycle():
    graph = {name: imports_of(path) for name, path in MODULES.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"cycle: {' -> '.join([*path, name])}"
        if name in done:
            return
        path.append(name)
        for imported in graph.get(name, ()):
            visit(imported)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_nobody_imports_a_script():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for name, path in MODULES.items():
        assert not imports_of(path) & scripts, name


@pytest.mark.parametrize("script", ["train", "generate", "evaluate"])
def test_training_scripts_need_neither_openslide_nor_kaggle(script):
    seen, queue = set(), [script]
    while queue:
        name = queue.pop()
        seen.add(name)
        source = ast.parse(MODULES[name].read_text())
        outside = {alias.name.split(".")[0] for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names}
        outside |= {node.module.split(".")[0] for node in ast.walk(source) if isinstance(node, ast.ImportFrom) and node.module}
        assert not outside & {"openslide", "kaggle", "kagglesdk"}, name
        queue += [imported for imported in imports_of(MODULES[name]) if imported not in seen]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_paths_of_this_machine_need_no_package_for_other_file_systems(name):
    """Such packages are imported where a URL is used, and by one module."""
    source = ast.parse(MODULES[name].read_text())
    imports = {node for node in ast.walk(source) if isinstance(node, ast.Import | ast.ImportFrom)}
    names = {node: {alias.name for alias in node.names} | {getattr(node, "module", None) or ""} for node in imports}
    found = {node for node in imports if {part.split(".")[0] for part in names[node]} & {"fsspec", "s3fs", "botocore", "aiohttp"}}
    assert not found & set(source.body)
    assert not found or name == "common.storage"
