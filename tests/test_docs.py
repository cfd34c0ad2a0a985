"""The pages of `docs/`: their programs run and print what the page says, and their pictures are there."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import integration

DOCS = Path(__file__).parents[1] / "docs"
if not DOCS.exists():
    pytest.skip("tests run outside a checkout", allow_module_level=True)
sys.path.insert(0, str(DOCS))
import examples  # noqa: E402  # found where the line above says
from examples import Example  # noqa: E402

sys.path.remove(str(DOCS))


def imported_modules(program: list[Example]) -> set[str]:
    """What a page's program imports from."""
    nodes = [node for example in program for node in ast.walk(ast.parse(example.code))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return set(names)


@pytest.mark.parametrize("page", examples.pages(), ids=lambda page: page.relative_to(DOCS).with_suffix("").as_posix())
def test_program_prints_what_the_page_says(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    program = examples.examples(page)
    for module in imported_modules(program):
        package, _, library = module.partition(".integrations.")
        if library:
            integration(library)
        else:
            pytest.importorskip(package.split(".")[0])
    namespace: dict[str, object] = {"__name__": page.stem}
    for example in program:
        # as many empty lines before it as on the page, so that a traceback shows the page's line
        exec(compile("\n" * (example.line - 1) + example.code, str(page), "exec"), namespace)
        printed = capsys.readouterr().out
        assert examples.agree(printed, example.output), f"{page}:{example.line} printed\n{printed}"


@pytest.mark.parametrize(("printed", "agrees"), [
    ("loss 0.57, 3 arrays\n", True), ("loss 0.59, 3 arrays", True), ("loss 0.60, 3 arrays", False),
    ("loss 0.57, 4 arrays", False), ("loss -0.57, 3 arrays", False), ("loss 0.57", False), ("", False)])
def test_outputs_agree_within_two_units_of_the_last_place(printed, agrees):
    assert examples.agree(printed, "loss 0.57, 3 arrays\n") is agrees


def test_each_picture_is_drawn_for_light_and_dark_pages_and_shown():
    shown = {name for page in DOCS.rglob("*.md")
             for name in re.findall(r"^```\{picture\} (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)}
    drawn = {file.name for file in (DOCS / "figures").glob("*.svg")}
    assert drawn == {f"{name}-{scheme}.svg" for name in shown for scheme in ("light", "dark")}
