#!/usr/bin/env bash
# Java to C#: each party alone, federated, pooled; then scores. README.md says what to expect.
#
#     run.sh DATA OUT [rows of a party: train held test]
#
# PROTOCOL=fed-split keeps the trunk with an owner; RULE=flora and ROUNDS=3 choose another rule and fewer rounds.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath -m "$1") out=$2
read -r train held test _ <<<"${*:3} 160 8 12"
settings=$here/translation.toml rule=${RULE:-fedit} rounds=${ROUNDS:-4} protocol=${PROTOCOL:-fed-params}
. "$here/../rounds.sh"
model=$(python -c 'from splitfl.demo import assets; print(assets() / "model")')

mkdir -p "$out"
cd "$out"
python -m examples.code_translation.prepare "$data" rows --train "$train" --held "$held" --test "$test"

parties=(search office services)
python -m examples.keys coordinator owner everybody "${parties[@]}"
splitfl kit kit --model "$model" --bottom 3 --top 3 --dtype float32 --no-verify >/dev/null
if [ "$protocol" = fed-split ]; then
    own --model "$model" --kit kit --dtype float32
    road=(--protocol fed-split --kit kit --owner "$owner_address" --owner-key keys/owner.key)
else
    road=(--protocol fed-params --kit kit --model "$model")
fi

for party in "${parties[@]}"; do
    federate "local-$party" "$party" -- "${road[@]}" &
    running+=($!)
done
for one in "${running[@]: -${#parties[@]}}"; do wait "$one"; done
federate federated "${parties[@]}" -- "${road[@]}"
# The pooled arm sees in a step what all parties together see in one of theirs.
federate pooled everybody -- "${road[@]}" --per-device-train-batch-size 12

tests=() arms=()
for party in "${parties[@]}"; do tests+=(--test "$party=rows/$party.test.jsonl"); done
for party in "${parties[@]}"; do arms+=(--arm "$party alone=local-$party/$party/adapter"); done
python -m examples.code_translation.score --model "$model" --kit kit "${tests[@]}" "${arms[@]}" \
    --arm "own rows alone=local-{party}/{party}/adapter" --arm "federated=federated/{party}/adapter" \
    --arm "pooled=pooled/everybody/adapter" --json scores.json
