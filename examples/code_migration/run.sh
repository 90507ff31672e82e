#!/usr/bin/env bash
# Edits of old Java: tuned alone and together, proposed, checked by each party's hook, queued for review.
#
#     run.sh DATA OUT [rows of a party: train held test]
#
# HOOK is the command that a party checks proposals with (default: does it parse?), for example HOOK=$PWD/javac.sh.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath -m "$1") out=$2
read -r train held test _ <<<"${*:3} 120 12 16"
settings=$here/migration.toml rule=${RULE:-fedit} rounds=${ROUNDS:-4}
. "$here/../rounds.sh"
model=$(python -c 'from splitfl.demo import assets; print(assets() / "model")')

mkdir -p "$out"
cd "$out"
python -m examples.code_migration.prepare "$data" rows --train "$train" --held "$held" --test "$test"

parties=(search office services)
python -m examples.keys coordinator "${parties[@]}"
splitfl kit kit --model "$model" --dtype float32 --no-verify >/dev/null
road=(--protocol fed-params --kit kit --model "$model")

if [ -z "${ONLY_FEDERATED:-}" ]; then
    for party in "${parties[@]}"; do
        federate "local-$party" "$party" -- "${road[@]}" &
        running+=($!)
    done
    for one in "${running[@]}"; do wait "$one"; done
fi
federate federated "${parties[@]}" -- "${road[@]}"

# From here on each party is by itself again: its rows, its hook, its queue.
for party in "${parties[@]}"; do
    for arm in "local-$party" federated; do
        [ -d "$arm" ] || continue
        echo "$party, $arm:"
        python -m examples.code_migration.propose --model "$model" --kit kit --adapter "$arm/$party/adapter" \
            --rows "rows/$party.test.jsonl" --queue "$party.$arm.queue.jsonl" ${HOOK:+--hook "$HOOK"} \
            --json "$party.$arm.json"
    done
done
python -m examples.code_migration.review "${parties[0]}.federated.queue.jsonl" list --status pending
