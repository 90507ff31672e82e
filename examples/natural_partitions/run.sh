#!/usr/bin/env bash
# Annotators of Dolly or speakers of Shakespeare, each a party: alone and federated. README.md says what to expect.
#
#     run.sh dolly|speakers DATA OUT [parties, rows of a party: train held test]
#
# RULE=fedsa keeps one factor of each pair at home: every party then ends with a model of its own.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
of=$1 data=$(realpath -m "$2") out=$3
read -r count train held test _ <<<"${*:4} 4 48 6 16"
settings=$here/natural.toml rule=${RULE:-fedit} rounds=${ROUNDS:-3}
. "$here/../rounds.sh"
model=$(python -c 'from splitfl.demo import assets; print(assets() / "model")')

mkdir -p "$out"
cd "$out"
found=$(python -m examples.natural_partitions.prepare "$data" rows --of "$of" --parties "$count" --train "$train" \
    --held "$held" --test "$test")
read -r -a parties <<<"$found"
echo "parties: ${parties[*]}"

python -m examples.keys coordinator "${parties[@]}"
splitfl kit kit --model "$model" --dtype float32 --no-verify >/dev/null
road=(--protocol fed-params --kit kit --model "$model")
arms=(--arm "federated=federated/{party}/adapter")
if [ -z "${ONLY_FEDERATED:-}" ]; then
    for party in "${parties[@]}"; do
        federate "local-$party" "$party" -- "${road[@]}" &
        running+=($!)
    done
    for one in "${running[@]}"; do wait "$one"; done
    arms=(--arm "alone=local-{party}/{party}/adapter" "${arms[@]}")
fi
federate federated "${parties[@]}" -- "${road[@]}"

tests=()
for party in "${parties[@]}"; do tests+=(--test "$party=rows/$party.test.jsonl"); done
python -m examples.compare --model "$model" --kit kit "${tests[@]}" "${arms[@]}" --json scores.json
