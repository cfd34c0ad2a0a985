"""Give a wheel the license of what repairing it has put in: the texts, and its part of ``License-Expression``.

The project is MIT; the OpenMP runtime that a wheel bundles is not, and its license must travel with it. The texts are
in ``licenses/`` beside this file, a folder for each runtime, and go where PEP 639 has them, ``*.dist-info/licenses/``.

    python .ci/wheel_licenses.py wheelhouse/fastnorm-0.1.0-cp311-cp311-macosx_11_0_arm64.whl

rewrites a wheel in place; needs the package ``wheel``. `repair_wheel.py` calls `declare` on the wheel that it has open.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LICENSES = Path(__file__).with_name("licenses")
# The folder in LICENSES, which is the library's name up to its version; the license as an SPDX expression.
EXPRESSIONS = {"libgomp": "GPL-3.0-or-later WITH GCC-exception-3.1", "libomp": "Apache-2.0 WITH LLVM-exception"}
PLACES = ("*.libs/*", "*/.dylibs/*")  # where auditwheel and delocate put libraries
EXPRESSION, FILE = "License-Expression: ", "License-File: "


def only(folder: Path, pattern: str) -> Path:
    """The one path in ``folder`` that matches."""
    (path,) = folder.glob(pattern)
    return path


def bundled(tree: Path) -> list[str]:
    """The names of the libraries that an unpacked wheel bundles; each must have a known license."""
    names = {re.split("[-.]", library.name)[0] for place in PLACES for library in tree.glob(place)}
    if unknown := names - set(EXPRESSIONS):
        sys.exit(f"bundled without a known license: {', '.join(sorted(unknown))}")
    return sorted(names)


def declare(tree: Path) -> None:
    """Add the license of each library bundled in an unpacked wheel."""
    information = only(tree, "*.dist-info")
    metadata = information / "METADATA"
    header, blank, description = metadata.read_text(encoding="utf-8").partition("\n\n")
    lines = header.split("\n")
    for name in bundled(tree):
        texts = shutil.copytree(LICENSES / name, information / "licenses" / name)
        lines = [f"{line} AND {EXPRESSIONS[name]}" if line.startswith(EXPRESSION) else line for line in lines]
        lines += [f"{FILE}{name}/{text.name}" for text in sorted(texts.iterdir())]
    metadata.write_text("\n".join(lines) + blank + description, encoding="utf-8")


def unpack(wheel: Path, folder: Path) -> Path:
    """Unpack a wheel; return the folder of its contents."""
    subprocess.run([sys.executable, "-m", "wheel", "unpack", "--dest", folder, wheel], check=True)
    return only(folder, "*")


def pack(tree: Path, folder: Path) -> None:
    """Make a wheel of a folder, with a new ``RECORD``."""
    subprocess.run([sys.executable, "-m", "wheel", "pack", "--dest-dir", folder, tree], check=True)


def main() -> None:
    """Declare what each wheel that is named bundles."""
    for wheel in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            tree = unpack(wheel, Path(folder))
            declare(tree)
            pack(tree, wheel.parent)


if __name__ == "__main__":
    main()
