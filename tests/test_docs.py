"""The pages of `docs/`: programs print what the page says, pictures are there, the reference has every public name."""

from __future__ import annotations

import ast
import pkgutil
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from conftest import integration

import fastnorm

DOCS = Path(__file__).parents[1] / "docs"
PACKAGE = Path(fastnorm.__file__).parent
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
def test_program_prints_what_the_page_says(page, request, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    program = examples.examples(page)
    modules = imported_modules(program)
    for module in modules:
        package, _, library = module.partition(".integrations.")
        if library:
            integration(library)
        else:
            pytest.importorskip(package.split(".")[0])
    if "torch" in modules:  # its threads spin where others want to run
        torch = sys.modules["torch"]
        request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
        torch.set_num_threads(1)
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


def public_modules() -> list[str]:
    """The package, the modules that it offers by name, and the integrations, which need not be importable here."""
    offered = [f"fastnorm.{name}" for name in fastnorm.__all__ if isinstance(getattr(fastnorm, name), ModuleType)]
    integrations = [f"fastnorm.integrations.{found.name}"
                    for found in pkgutil.iter_modules([str(PACKAGE / "integrations")]) if found.name[0] != "_"]
    return ["fastnorm", *offered, *integrations]


def public_names(module: str) -> list[str]:
    """What the module lists in ``__all__``, read from its source."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    lists = [node.value for node in ast.parse(source.read_text(encoding="utf-8")).body
             if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    return [f"{module}.{name}" for name in ast.literal_eval(lists[0])]


def documented_names() -> set[str]:
    """The full names of what the pages of the reference describe."""
    names = set()
    for page in (DOCS / "api").glob("*.rst"):
        module = ""
        for directive, name in re.findall(r"^\.\. (\w+):: ([\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            if directive in ("currentmodule", "module", "automodule"):
                module = name
            if directive in ("module", "automodule"):
                names.add(name)
            if directive in ("autofunction", "autoclass"):
                names.add(name if name.startswith("fastnorm.") else f"{module}.{name}")
    return names


@pytest.mark.parametrize("module", public_modules())
def test_reference_has_every_public_name(module):
    assert set(public_names(module)) - documented_names() == set()


def table_rows(page: Path) -> list[list[str]]:
    """The rows of all tables of a page, each as its cells."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_speed_table_of_the_readme_is_of_the_speed_page():
    """Each row has the time and the ratios of a row there."""
    claims = [(row[1], *(ratio.removesuffix(" ×") for ratio in row[3:]))
              for row in table_rows(DOCS.parent / "README.md") if row[-1].endswith(" ×")]
    measured = table_rows(DOCS / "speed.md")
    assert len(claims) > 10
    for claim in claims:
        assert any(claim[0] == row[1] and set(claim) <= set(row) for row in measured), claim


def test_front_page_claims_what_the_speed_page_measured():
    """The picture is drawn from the speed page: its values are those of the table of geometric means there."""
    means = (DOCS / "speed.md").read_text(encoding="utf-8").split("## Geometric means", 1)[1].split("\n\n")[2]
    rows = [re.findall(r"([\d.]+) \(", line)[1:3] for line in means.splitlines()[2:]]
    (alt,) = re.findall(r"^:alt: (.*)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    for column, words in enumerate(("from {} to {} times as fast as PyTorch", "from {} to {} times as JAX")):
        values = [float(row[column]) for row in rows]
        assert words.format(f"{min(values):.1f}", f"{max(values):.1f}") in alt
