# What the recipes share: one federation after the other on this machine. Sourced, not run.
# shellcheck shell=bash

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

running=()
end_all() {
    local one
    for one in "${running[@]}"; do kill "$one" 2>/dev/null || true; done
    wait || true
}
trap end_all EXIT

# wait_ready FILE: the address after `ready` in what a server prints, as $address.
wait_ready() {
    local tries
    for tries in $(seq 600); do
        if read -r _ address _ <"$1" 2>/dev/null && [ -n "${address:-}" ]; then return; fi
        kill -0 "${running[-1]}" 2>/dev/null || break
        sleep 0.2
    done
    echo "no server came up after $tries looks; see ${1%.ready}.log" >&2
    exit 1
}

# own OPTION...: start an owner of the trunk; sets $owner_address.
own() {
    splitfl serve --bind tcp://127.0.0.1:0 --key keys/owner.key_secret --parties parties "$@" >owner.ready 2>owner.log &
    running+=($!)
    wait_ready owner.ready
    owner_address=$address
}

# federate NAME PARTY... -- OPTION...: one federation of these parties. Each tunes on rows/PARTY.train.jsonl, validates
# on rows/PARTY.held.jsonl, and writes NAME/PARTY; a party alone is a federation of one, which is plain LoRA training.
# Runs in a shell of its own, so that several can run at once.
federate() (
    name=$1 parties=() sum=mask failed=0 tuning=() running=()
    trap end_all EXIT
    shift
    while [ "$1" != -- ]; do parties+=("$1"); shift; done
    shift
    [ ${#parties[@]} -ge 3 ] || sum=plain      # a sum of two hides nothing from either, and of one nothing at all
    mkdir -p "$name/parties"                   # the coordinator waits for all that may come
    for party in "${parties[@]}"; do cp "parties/$party.key" "$name/parties/"; done
    splitfl federate --bind tcp://127.0.0.1:0 --key keys/coordinator.key_secret --parties "$name/parties" \
        --state "$name/state" --rounds "$rounds" --rule "$rule" --sum "$sum" --min-parties ${#parties[@]} --wait 300 \
        --json "$name/rounds.json" >"$name/coordinator.ready" 2>"$name/coordinator.log" &
    running+=($!)
    coordinator=$!
    wait_ready "$name/coordinator.ready"
    for party in "${parties[@]}"; do
        splitfl tune --config "$settings" --federate "$address" --coordinator-key keys/coordinator.key \
            --key "keys/$party.key_secret" --peers "$name/parties" --rule "$rule" --sum "$sum" --ledger ledger.sqlite \
            --train "rows/$party.train.jsonl" --eval "rows/$party.held.jsonl" --out "$name/$party" --threads 1 \
            --json "$name/$party.json" "$@" 2>"$name/$party.log" >"$name/$party.out" &
        running+=($!)
        tuning+=($!)
    done
    for party in "${tuning[@]}" "$coordinator"; do wait "$party" || failed=1; done
    if [ $failed = 1 ]; then
        tail -n 5 "$name"/*.log >&2
        exit 1
    fi
    echo "$name: done" >&2
)
