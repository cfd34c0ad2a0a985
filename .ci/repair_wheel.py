"""Repair a Linux wheel: ``auditwheel repair``; the OpenMP runtime that it bundles gets its plain name back and its
license is declared (`wheel_licenses.py`).

auditwheel renames what it bundles (``libgomp-1a2b3c4d.so.1.0.0``), so that every wheel runs a copy of its own. Of a
runtime that keeps a pool of threads, a process should hold one: idle threads of one pool spin on the cores that the
other one wants (`bench/two_runtimes.py` measures it beside PyTorch). The loader knows libraries by name: called
``libgomp.so.1``, as in PyTorch's wheel and in every Linux distribution, whichever copy was loaded first serves all.

    python .ci/repair_wheel.py dist/fastnorm-0.1.0-cp311-cp311-linux_x86_64.whl wheelhouse/

Needs auditwheel and patchelf on PATH (the manylinux and musllinux images have them), and the package ``wheel``.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from wheel_licenses import declare, only, pack, unpack

PLAIN_NAME = "libgomp.so.1"
# Versions of libgomp's symbols that kernels may ask for. The copy that serves them may be another wheel's: the newest
# of these came with GCC 9 (2019), and the copy of the manylinux_2_28 image, PyTorch's and scikit-learn's, has it.
OLD_ENOUGH = {"GOMP_1.0", "GOMP_2.0", "GOMP_3.0", "GOMP_4.0", "GOMP_4.0.1", "GOMP_4.5",
              "OMP_1.0", "OMP_2.0", "OMP_3.0", "OMP_3.1", "OMP_4.0", "OMP_4.5", "OMP_5.0"}


def run(*command: str | Path) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True)


def give_plain_name_back(tree: Path) -> None:
    """Rename the bundled libgomp in an unpacked wheel, and what its users ask for."""
    bundled = only(tree, "*.libs/libgomp-*")
    kernels = sorted(tree.rglob("_kernels/**/*.so"))
    wanted = {version.decode() for kernel in kernels
              for version in re.findall(rb"\bG?OMP_[0-9.]+\b", kernel.read_bytes())}
    if not wanted or not wanted <= OLD_ENOUGH:
        sys.exit(f"kernels ask for versions of libgomp's symbols that another copy may lack: {sorted(wanted)}")
    run("patchelf", "--set-soname", PLAIN_NAME, bundled)
    run("patchelf", "--replace-needed", bundled.name, PLAIN_NAME, *kernels)
    bundled.rename(bundled.with_name(PLAIN_NAME))


def main() -> None:
    """Write the repaired wheel into a folder."""
    parser = argparse.ArgumentParser(description="auditwheel repair, with libgomp under its plain name")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        repaired = Path(folder, "repaired")
        run("auditwheel", "repair", "--wheel-dir", repaired, arguments.wheel)
        tree = unpack(only(repaired, "*.whl"), Path(folder, "unpacked"))
        give_plain_name_back(tree)
        declare(tree)
        arguments.output.mkdir(parents=True, exist_ok=True)
        pack(tree, arguments.output)


if __name__ == "__main__":
    main()
