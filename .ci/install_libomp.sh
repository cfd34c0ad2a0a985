#!/usr/bin/env bash
# Puts LLVM's OpenMP runtime, which Apple's compiler lacks, into a folder: conda-forge's build, because it runs on macOS 11
# (Homebrew's runs on the release that it was built on alone, and with it the wheel). Same build as in scikit-learn's wheels.
set -euo pipefail
destination=$1
case $(uname -m) in
    arm64)
        file=osx-arm64/llvm-openmp-11.1.0-hf3c4609_1.tar.bz2
        sha256=29763e493e46801c416f2e75f20e9183719bde3b727d8983b1917a480b4076fe ;;
    x86_64)
        file=osx-64/llvm-openmp-11.1.0-hda6cdc1_1.tar.bz2
        sha256=1ebfeee2af90bcedf6b39c7290244e2aec0bda01ecf81b0d8d78ed405480c21c ;;
esac
mkdir -p "$destination"
archive=$destination/llvm-openmp.tar.bz2
curl --fail --silent --show-error --location --retry 3 --output "$archive" \
    "https://anaconda.org/conda-forge/llvm-openmp/11.1.0/download/$file"
echo "$sha256  $archive" | shasum --algorithm 256 --check # its code becomes part of the wheel
tar xjf "$archive" -C "$destination" include lib
