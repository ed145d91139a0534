"""What may import what, and what must come up without torch."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import koinon

PACKAGE = Path(koinon.__file__).parent
ORDER = [
    "units", "errors", "cost", "model", "optim", "data", "net", "run", "verify", "chain", "nodes", "serve", "local",
    "sim", "dashboard", "cli",
]  # fmt: skip
FORBIDDEN = {"net": {"torch", "koinon.model", "koinon.optim", "koinon.data"}, "data": {"torch"}, "run": {"torch"}}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(("koinon", *(part for part in parts if part != "__init__"))), path


def imports(name: str, path: Path) -> set[str]:
    """Every module that a file names in an import, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=module, names=names, level=0):
                found |= {f"{module}.{alias.name}" for alias in names} | {str(module)}
            case ast.ImportFrom():
                raise AssertionError(f"{name} imports relatively: write the whole name")
    return found


def area(module: str) -> str | None:
    """The part of the layout that a module belongs to; None outside the package and for its front door."""
    head, *rest = module.split(".")
    return rest[0] if head == "koinon" and rest else None


def wrong(name: str, found: set[str]) -> list[str]:
    """What `name` imports against the rule."""
    mine = area(name)
    if mine is None:  # `koinon/__init__.py` shows names from every part, when they are asked for
        return []
    later = ORDER[ORDER.index(mine) + 1 :]
    barred = FORBIDDEN.get(mine, set())
    return sorted(
        module
        for module in found
        if area(module) in later or any(module == bar or module.startswith(f"{bar}.") for bar in barred)
    )


def test_every_part_has_a_place_in_the_order() -> None:
    assert {area(name) for name, _ in modules()} - {None} <= set(ORDER)


@pytest.mark.parametrize(("name", "path"), [pytest.param(n, p, id=n) for n, p in modules()])
def test_a_module_imports_only_what_stands_before_it(name: str, path: Path) -> None:
    assert wrong(name, imports(name, path)) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("koinon.model.stage", "from koinon.net.frames import Wire"),
        ("koinon.net.frames", "import torch.nn"),
        ("koinon.net.frames", "from koinon.data import DataConfig"),
        ("koinon.run.state", "def f():\n    from koinon.nodes import worker"),
        ("koinon.data.corpus", "from koinon import local"),
    ],
)
def test_the_rule_can_be_broken(tmp_path: Path, name: str, source: str) -> None:
    (tmp_path / "module.py").write_text(source)
    assert wrong(name, imports(name, tmp_path / "module.py"))


def submodules(package: str) -> list[str]:
    folder = PACKAGE / package
    return [f"koinon.{package}", *(m.name for m in pkgutil.walk_packages([str(folder)], f"koinon.{package}."))]


def without_torch(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\nimport sys\nassert 'torch' not in sys.modules, 'torch was loaded'"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "names",
    [["koinon"], *(submodules(package) for package in ("net", "run", "data", "cli"))],
    ids=["koinon", "net", "run", "data", "cli"],
)
def test_it_comes_up_without_torch(names: list[str]) -> None:
    without_torch("\n".join(f"import {name}" for name in names))


@pytest.mark.parametrize("role", ["coordinator", "trainer"])
def test_a_role_that_holds_no_weights_comes_up_without_torch(role: str) -> None:
    without_torch(f"import koinon.nodes.{role}")


def test_help_loads_no_torch() -> None:
    (command,) = entry_points(group="console_scripts", name="koinon")
    without_torch(f"""
import sys
from {command.module} import {command.attr}
sys.argv = ["koinon", "--help"]
try:
    {command.attr}()
except SystemExit as end:
    assert not end.code
""")
