"""Builds every kernel once per instruction-set level.

The table of levels, the compiler probes and the flags live here and nowhere else; project metadata is in
pyproject.toml. Each ``fastnorm/_kernels/*.pyx`` is translated to C once and compiled once a level, into
``fastnorm/_kernels/<level>/``; ``fastnorm/_runtime.py`` decides at import which level runs.

Environment: ``FASTNORM_LEVELS=baseline,avx2`` builds only these levels, ``FASTNORM_OPENMP=0`` builds without OpenMP,
``FASTNORM_OPENMP=/openmp`` tries no other flag for it, ``FASTNORM_JOBS=n`` sets how many compilers run at once,
``FASTNORM_CFLAGS="-O1 -g"`` adds flags that prevail over the others, ``FASTNORM_DEBUG=1`` makes a debug build:
assertions at the kernels' entrances, index checks, guarded scratch.
"""

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext  # before distutils, which setuptools provides

from distutils.ccompiler import new_compiler  # isort: skip
from distutils.sysconfig import customize_compiler  # isort: skip

KERNELS = Path("fastnorm/_kernels")
PER_LEVEL = ("activation", "bandwidth", "batchnorm", "optimizer", "softmax")
# No arithmetic worth a level; `runtime` runs before the CPU is known.
BASELINE_ONLY = ("checks", "output_pool", "runtime")
MSVC = sys.platform == "win32"
DEBUG = os.environ.get("FASTNORM_DEBUG", "0") != "0"

# What a level needs of the compiler. The CPU side of the same table is `fastnorm_cpu_supports` in vector.h.
X86_LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mbmi", "-mbmi2"],
    "avx512": ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mavx512f", "-mavx512cd", "-mavx512bw", "-mavx512dq",
               "-mavx512vl", "-mprefer-vector-width=512"],
}

# No -ffast-math and no -march=native: results must not depend on the build machine, and linking fast-math flushes
# denormals for the whole process. -ffp-contract=off: vector body and tail, forward and backward give the same bits;
# where fused multiply-add pays (exp), vector.h asks for it by name.
FLAGS = ["/O2"] if MSVC else ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
                              "-fopenmp-simd", "-fvisibility=hidden", "-Wno-unused-function", "-Wno-unused-variable",
                              "-Wno-unreachable-code"]
# Cython's `assert` costs nothing in a release. FASTNORM_DEBUG is also what vector.h looks at.
FLAGS += (["/DFASTNORM_DEBUG"] if MSVC else ["-O1", "-g", "-DFASTNORM_DEBUG"]) if DEBUG else [
    "/DCYTHON_WITHOUT_ASSERTIONS" if MSVC else "-DCYTHON_WITHOUT_ASSERTIONS"]
# What to try, in order: (compile flags, link flags). Apple's Clang knows OpenMP behind its driver's back and brings no
# runtime: libomp is where CFLAGS and LDFLAGS point, or Homebrew's, which is in no folder that compilers search.
HOMEBREW = ("/opt/homebrew/opt/libomp", "/usr/local/opt/libomp")
OPENMP = {
    "win32": [(["/openmp:llvm"], []), (["/openmp"], [])],
    "darwin": [(["-Xpreprocessor", "-fopenmp"], ["-lomp"]),
               *((["-Xpreprocessor", "-fopenmp", f"-I{at}/include"], [f"-L{at}/lib", "-lomp"]) for at in HOMEBREW),
               (["-fopenmp"], ["-fopenmp"])],
}.get(sys.platform, [(["-fopenmp"], ["-fopenmp"])])

DIRECTIVES = {"language_level": 3, "boundscheck": DEBUG, "wraparound": False, "cdivision": True, "binding": False,
              "initializedcheck": DEBUG, "freethreading_compatible": True}

OPENMP_PROBE = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
FLAG_PROBE = "int main(void) { return 0; }\n"


def is_x86_64():
    """True where the compiler's target is 64-bit x86 (a cross build for macOS arm64 names its target in ARCHFLAGS)."""
    target = os.environ.get("ARCHFLAGS", "") or platform.machine()
    return not MSVC and any(name in target for name in ("x86_64", "AMD64", "amd64"))


def accepts(source, compile_flags, link_flags=()):
    """Whether the compiler builds and links ``source`` with these flags."""
    compiler = new_compiler()
    customize_compiler(compiler)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "probe.c")
        file.write_text(source)
        sys.stderr.flush()
        saved, quiet = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(quiet, 2)  # a refused probe is an answer, not an error to show
            objects = compiler.compile([str(file)], output_dir=folder, extra_postargs=list(compile_flags))
            # linked as the kernels will be: LDFLAGS are not for executables
            compiler.link_shared_object(objects, str(Path(folder, "probe.so")), extra_postargs=list(link_flags))
        except Exception:  # every compiler class has exceptions of its own; any of them means "no"
            return False
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(quiet)
    return True


def levels():
    """Name to compile flags of the levels that this compiler can target and the user did not exclude."""
    wanted = [name for name in os.environ.get("FASTNORM_LEVELS", "").split(",") if name]
    known = X86_LEVELS if is_x86_64() else {"baseline": []}
    if unknown := set(wanted) - set(known):
        raise SystemExit(f"FASTNORM_LEVELS: expected names among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return {name: flags for name, flags in known.items()
            # the baseline is not a question: where no compiler works, the build must fail
            if name == "baseline" or ((not wanted or name in wanted) and accepts(FLAG_PROBE, flags))}


def openmp():
    """The first pair of OpenMP flags that works, or two empty lists."""
    wanted = os.environ.get("FASTNORM_OPENMP", "")
    if wanted != "0":
        for compile_flags, link_flags in [([wanted], [] if MSVC else [wanted])] if wanted else OPENMP:
            if accepts(OPENMP_PROBE, compile_flags, link_flags):
                return compile_flags, link_flags
    print("fastnorm: building without OpenMP; kernels will run on one thread", file=sys.stderr)
    return [], []


def extensions():
    """Translate each kernel to C once; one extension for each kernel and level, compiled from a copy of that file."""
    headers = [str(path) for pattern in ("*.h", "*.pxd", "*.pxi") for path in sorted(KERNELS.glob(pattern))]
    translated = cythonize(
        [Extension(f"fastnorm._kernels.{name}", [str(KERNELS / f"{name}.pyx")], depends=headers)
         for name in (*BASELINE_ONLY, *PER_LEVEL)],
        build_dir="build/cython-debug" if DEBUG else "build/cython", compiler_directives=DIRECTIVES)
    openmp_compile, openmp_link = openmp()
    expanded = []
    for level, level_flags in levels().items():
        flags = FLAGS + level_flags + openmp_compile + os.environ.get("FASTNORM_CFLAGS", "").split()
        for kernel, template in zip((*BASELINE_ONLY, *PER_LEVEL), translated, strict=True):
            if kernel in BASELINE_ONLY and level != "baseline":
                continue
            package = "fastnorm._kernels" + ("" if kernel in BASELINE_ONLY else f".{level}")
            # Object files are named after the source, and levels compile side by side: hence a copy a level.
            source = Path("build", "levels", level, f"{kernel}.c")
            source.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(template.sources[0], source)
            # Objects are up to date by their time; a file that changes with the flags makes other flags build anew.
            stamp, built_with = source.with_suffix(".flags"), " ".join([*flags, *openmp_link])
            if not stamp.exists() or stamp.read_text() != built_with:
                stamp.write_text(built_with)
            expanded.append(Extension(
                f"{package}.{kernel}", [str(source)], depends=[*headers, str(stamp)],
                include_dirs=[str(KERNELS), np.get_include()],
                extra_compile_args=flags, extra_link_args=openmp_link,
                define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
                               ("FASTNORM_BUILD_FLAGS", '"' + " ".join(flags) + '"')]))
    # The slowest translation units first, so that no core idles at the end.
    return sorted(expanded, key=lambda ext: -Path(ext.sources[0]).stat().st_size)


class BuildKernels(build_ext):
    """`build_ext` that compiles side by side and makes a level's folder in the source tree."""

    def finalize_options(self):
        """Compile on every core unless told otherwise."""
        super().finalize_options()
        self.parallel = self.parallel or int(os.environ.get("FASTNORM_JOBS", 0)) or os.cpu_count()

    def copy_extensions_to_source(self):
        """Make each level's folder, then copy."""
        for extension in self.extensions:
            Path(*extension.name.split(".")[:-1]).mkdir(exist_ok=True)
        super().copy_extensions_to_source()


setup(cmdclass={"build_ext": BuildKernels}, ext_modules=extensions())
