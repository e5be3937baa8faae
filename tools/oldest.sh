#!/usr/bin/env bash
# Runs the core tests with the oldest versions that pyproject.toml promises, in an environment of its own.
#
#     tools/oldest.sh [FOLDER]
#
# PYTHON names the interpreter; the oldest that is promised is 3.11.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build/oldest}
rm -rf "$folder"
"${PYTHON:-python3.11}" -m venv "$folder"
# "torch>=2.6" becomes "torch==2.6", which pip reads as 2.6.0.
"$folder/bin/python" -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*(line.replace(">=", "==") for line in tomllib.load(file)["project"]["dependencies"]), sep="\n")
' > "$folder/oldest.txt"
cat "$folder/oldest.txt"
"$folder/bin/python" -m pip install --quiet --constraint "$folder/oldest.txt" --editable ".[test-core]"
make test-core VENV="$folder" RUN="$folder/bin/python" INSTALLED=yes
