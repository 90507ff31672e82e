#!/usr/bin/env bash
# Tune stories260K through the split, from keys to figures, on this machine. README.md says what to expect.
#
#     run.sh MODEL ROWS OUT [further options of `splitfl tune`]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
model=$1 rows=$2 out=$3
shift 3

python "$here/prepare.py" "$model" "$rows" "$out"
cd "$out"

# The model owner: keys, kit, server.
splitfl keys new owner --out keys
splitfl keys new writer --out keys        # the data holder's own; the owner gets writer.key
splitfl keys allow keys/writer.key --parties parties
splitfl kit kit --model model --bottom 1 --top 1
mkfifo ready
splitfl serve --model model --kit kit --bind tcp://127.0.0.1:0 --key keys/owner.key_secret --parties parties \
    >ready 2>owner.log &
owner=$!
trap 'kill $owner 2>/dev/null; wait $owner 2>/dev/null; rm -f ready' EXIT
read -r _ address _ <ready                # waits until the owner can be used

# The data holder.
splitfl tune --kit kit --owner "$address" --owner-key keys/owner.key --key keys/writer.key_secret \
    --config "$here/stories.toml" --train train.jsonl --eval held.jsonl --out run --json tune.json "$@"
splitfl evaluate --run run --eval held.jsonl --json evaluate.json
splitfl generate --run run --prompt "Once upon a time, there was a" --max-new-tokens 60 --json generate.json
