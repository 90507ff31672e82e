#!/usr/bin/env bash
# Four servers with other shares of labels tune a classifier, with peers and alone; then HateCheck. See README.md.
#
#     run.sh DATA OUT [rows of a server: train held]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath -m "$1") out=$2
read -r train held _ <<<"${*:3} 300 100"
rounds=${ROUNDS:-5}
. "$here/../rounds.sh"
model=$(python -m examples.encoder)

mkdir -p "$out"
cd "$out"
python -m examples.moderation.prepare "$data" rows --train "$train" --held "$held"

servers=(north south east west)
python -m examples.keys "${servers[@]}"

# Each server gives its address to the others; here all are on this machine.
read -r -a ports <<<"$(python -m examples.ports ${#servers[@]})"
peers=()
for index in "${!servers[@]}"; do peers+=("${servers[$index]}=tcp://127.0.0.1:${ports[$index]}"); done
for index in "${!servers[@]}"; do
    server=${servers[$index]} named=()
    for peer in "${peers[@]}"; do [ "${peer%%=*}" = "$server" ] || named+=(--peer "$peer"); done
    splitfl fedmod --config "$here/moderation.toml" --model "$model" --key "keys/$server.key_secret" --peers parties \
        --bind "tcp://127.0.0.1:${ports[$index]}" "${named[@]}" --train "rows/$server.train.jsonl" \
        --eval "rows/$server.held.jsonl" --out "$server" --rounds "$rounds" --ledger "$server.sqlite" \
        --json "$server.json" ${MORE:-} >"$server.out" 2>"$server.log" &
    running+=($!)
done
for one in "${running[@]}"; do
    wait "$one" || { tail -n 5 ./*.log >&2; exit 1; }
done
python -m examples.moderation.table "${servers[@]}"

# What the tuned classifiers make of cases that test one thing each. The kit is only asked for the classes' numbers.
splitfl kit kit --model "$model" --task sequence-classification --num-labels 3 --no-verify >/dev/null
runs=()
for server in "${servers[@]}"; do runs+=(--run "$server=$server"); done
python -m examples.moderation.hatecheck "$data" --model "$model" --kit kit "${runs[@]}" --json hatecheck.json
