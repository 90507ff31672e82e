#!/usr/bin/env bash
# One of three tasks between three parties, each alone and federated. README.md says what to expect.
#
#     run.sh medquad|pubmedqa|financial DATA OUT [rows of a party: train held test]
#
# medquad keeps the trunk with an owner (fed-split); the two others tune a small encoder that every party has.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
of=$1 data=$(realpath -m "$2") out=$3
read -r train held test _ <<<"${*:4} 120 8 32"
rule=${RULE:-fedit} rounds=${ROUNDS:-3}
. "$here/../rounds.sh"
if [ "$of" = medquad ]; then
    model=$(python -c 'from splitfl.demo import assets; print(assets() / "model")')
else
    model=$(python -m examples.encoder)
fi

mkdir -p "$out"
cd "$out"
found=$(python -m examples.medical_financial.prepare "$data" rows --of "$of" --train "$train" --held "$held" \
    --test "$test")
read -r -a parties <<<"$found"
echo "parties: ${parties[*]}"
python -m examples.keys coordinator owner "${parties[@]}"

if [ "$of" = medquad ]; then
    settings=$here/answers.toml length=128
    splitfl kit kit --model "$model" --bottom 2 --top 2 --dtype float32 --no-verify >/dev/null
    own --model "$model" --kit kit --dtype float32
    road=(--protocol fed-split --kit kit --owner "$owner_address" --owner-key keys/owner.key)
else
    settings=$here/classes.toml length=96
    splitfl kit kit --model "$model" --task sequence-classification --num-labels 3 --dtype float32 --no-verify >/dev/null
    road=(--protocol fed-params --kit kit --model "$model")
fi

arms=(--arm "federated=federated/{party}/adapter")
if [ -z "${ONLY_FEDERATED:-}" ]; then
    alone=()
    for party in "${parties[@]}"; do
        federate "local-$party" "$party" -- "${road[@]}" &
        running+=($!) alone+=($!)
    done
    for one in "${alone[@]}"; do wait "$one"; done
    arms=(--arm "alone=local-{party}/{party}/adapter" "${arms[@]}")
fi
federate federated "${parties[@]}" -- "${road[@]}"

tests=()
for party in "${parties[@]}"; do tests+=(--test "$party=rows/$party.test.jsonl"); done
python -m examples.compare --model "$model" --kit kit "${tests[@]}" "${arms[@]}" --max-length "$length" --json scores.json
