#!/bin/sh
# The OpenMP runtime that a wheel bundles, where the system has none that will do: conda-forge's, which
# is current and runs on old systems. Called by cibuildwheel before it builds (pyproject.toml).
set -eu

case "$(uname -s)-$(uname -m)" in
  Linux-x86_64) platform=linux-64 package=libgomp root=/opt/openmp ;;
  Linux-aarch64) platform=linux-aarch64 package=libgomp root=/opt/openmp ;;
  Darwin-x86_64) platform=osx-64 package=llvm-openmp root=/tmp/openmp ;;
  Darwin-arm64) platform=osx-arm64 package=llvm-openmp root=/tmp/openmp ;;
  *) echo "openmp.sh: no runtime is known for $(uname -s) $(uname -m)" >&2; exit 1 ;;
esac
# Alpine's runtime is that of its compiler, and what is built for glibc does not run there.
if [ -f /etc/alpine-release ]; then exit 0; fi

work=$(mktemp -d)
curl --fail --silent --show-error --location --retry 3 \
  "https://micro.mamba.pm/api/micromamba/$platform/latest" | tar -xj -C "$work" bin/micromamba
export MAMBA_ROOT_PREFIX="$work/root"
"$work/bin/micromamba" create --yes --quiet --prefix "$root" --platform "$platform" \
  --override-channels --channel conda-forge "$package"
rm -rf "$work"
ls -l "$root"/lib/lib*omp*
