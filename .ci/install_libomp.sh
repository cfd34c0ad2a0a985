#!/usr/bin/env bash
# Puts LLVM's OpenMP runtime, which Apple's compiler lacks, into a folder: conda-forge's build, because it runs on macOS 11
# (Homebrew's runs on the release that it was built on alone, and with it the wheel). Same build as in scikit-learn's wheels.
set -euo pipefail
destination=$1
case $(uname -m) in
    arm64) file=osx-arm64/llvm-openmp-11.1.0-hf3c4609_1.tar.bz2 ;;
    x86_64) file=osx-64/llvm-openmp-11.1.0-hda6cdc1_1.tar.bz2 ;;
esac
mkdir -p "$destination"
curl --fail --silent --show-error --location --retry 3 \
    "https://anaconda.org/conda-forge/llvm-openmp/11.1.0/download/$file" | tar xj -C "$destination" include lib
