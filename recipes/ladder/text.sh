#!/usr/bin/env bash
# Text of the ladder, on Debian: kernel sources and documentation, and a dictionary; about 155 MB to download.
# Elsewhere: itt study text --input FOLDER FOLDER ... with folders of any text, named as in recipes/base/ladder.yaml.
#   bash recipes/ladder/text.sh [runs/ladder]
set -euo pipefail
root=${1:-runs/ladder}
mkdir -p "$root/packages" "$root/unpacked" "$root/folders/code" "$root/folders/prose"
(cd "$root/packages" && apt-get download linux-source-6.1 dict-gcide)
for package in "$root"/packages/*.deb; do dpkg-deb -x "$package" "$root/unpacked"; done
unpack() { tar -xf "$root"/unpacked/usr/src/linux-source-6.1.tar.xz -C "$1" --strip-components 1 --wildcards "${@:2}"; }
unpack "$root/folders/code" '*.c' '*.S' '*.py' '*.sh'
unpack "$root/folders/prose" '*.rst' '*.txt'
cp "$root/unpacked/usr/share/dictd/gcide.dict.dz" "$root/folders/prose/"
"${PYTHON:-python}" -m megatron_itt.cli study text \
    --input "$root/folders/code" "$root/folders/prose" --output "$root/text"
