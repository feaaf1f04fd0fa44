"""The house: rooms in their order, none too large, files that can be read in one go."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "quarot_onnx"


def lines(path: Path) -> int:
    return path.read_text("utf-8").count("\n")


def test_no_module_is_longer_than_300_lines() -> None:
    assert not {path.name for path in PACKAGE.rglob("*.py") if lines(path) > 300}


def test_few_modules_stand_outside_the_rooms() -> None:
    assert len([path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]) <= 8


def test_no_room_holds_more_than_an_eighth() -> None:
    sizes = {room.name: sum(map(lines, room.rglob("*.py"))) for room in PACKAGE.iterdir() if room.is_dir()}
    large = {name: size for name, size in sizes.items() if size > sum(sizes.values()) / 8}
    assert not large


def test_imports_go_down_the_list_of_rooms() -> None:
    document = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    listed = re.search(r"never up.*?```text\n(.*?)```", document, re.S)
    assert listed is not None
    rooms = [line.split()[0] for line in listed[1].splitlines()]
    modules = {
        path: path.relative_to(PACKAGE).with_suffix("").parts
        for path in (PACKAGE).rglob("*.py")
        if path.name != "child.py"  # a script of its own
    }
    assert {parts[0] for parts in modules.values()} == {*rooms, "__init__"}
    for path, parts in modules.items():
        for imported in imported_modules(path):
            below, above = imported[0], parts[0]
            assert above in ("__init__", below) or rooms.index(above) < rooms.index(below), f"{path}: {imported}"


def imported_modules(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports anywhere, as parts below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{name}" for name in names]
        found |= {tuple(name.split(".")[1:]) for name in names if name.startswith("quarot_onnx.")}
    return found
