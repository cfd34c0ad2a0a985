"""The examples of the pages: each page's Python blocks make one program.

`tests/test_docs.py` runs them. `python docs/examples.py FOLDER` writes each page as a file there, for a type checker.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent
GENERATED = ("speed.md", "accuracy.md")  # written by other commands, which have tests of their own
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
DECIMAL = re.compile(r"-?\d+\.\d+")


@dataclass(frozen=True)
class Example:
    """A block, what the page says that it prints ("" where it does not say), and the line where it begins."""

    code: str
    output: str
    line: int


def pages() -> list[Path]:
    """The pages with examples."""
    return [page for page in sorted(DOCS.rglob("*.md")) if page.name not in GENERATED and examples(page)]


def examples(page: Path) -> list[Example]:
    """The Python blocks of a page, each with the text block that follows it."""
    text = page.read_text(encoding="utf-8")
    return [Example(found[1], found[2] or "", text.count("\n", 0, found.start(1)) + 1)
            for found in BLOCK.finditer(text)]


def agree(printed: str, expected: str) -> bool:
    """Whether an output is the one on the page, with two units of room in the last place shown of each decimal.

    Matrix products round differently from one BLAS library to the next, and training amplifies that.

    Examples
    --------
    >>> agree("loss 0.104", "loss 0.105"), agree("loss 0.104", "loss 0.107"), agree("loss", "lose")
    (True, False, False)
    """
    if DECIMAL.split(printed.rstrip()) != DECIMAL.split(expected.rstrip()):
        return False
    pairs = zip(DECIMAL.findall(printed), DECIMAL.findall(expected), strict=True)
    # 2.5: between the decimal fractions lie the roundings of both
    return all(abs(float(a) - float(b)) < 2.5 * 10.0 ** -len(b.split(".")[1]) for a, b in pairs)


def main() -> None:
    """Write each page's blocks as a program into the folder given."""
    (folder,) = sys.argv[1:]
    for page in pages():
        name = "_".join(page.relative_to(DOCS).with_suffix("").parts).replace("-", "_")
        Path(folder, f"{name}.py").write_text("\n".join(e.code for e in examples(page)), encoding="utf-8")


if __name__ == "__main__":
    main()
