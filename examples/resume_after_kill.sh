#!/usr/bin/env bash
# Kill a training run with SIGKILL, start it again, and show that it continues from its newest checkpoint.
#
#   bash examples/resume_after_kill.sh FOLDER [--section.key value ...]
#
# Settings after FOLDER are passed to bin/train.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$1
shift
mkdir -p "$folder"
cd "$folder"
train=("$repository/bin/train" --config "$repository/configs/quickstart.yaml"
       --schedule.max_updates 60 --checkpoint.every_updates 5 "$@")

echo "== start, and kill -9 after the first checkpoint of a trained update"
"${train[@]}" &
pid=$!
until compgen -G "runs/quickstart/checkpoints/u*[1-9]*-*" > /dev/null; do
    kill -0 "$pid"  # fails if the run ended before its first checkpoint
    sleep 0.1
done
kill -9 "$pid"
wait "$pid" || echo "the run ended with exit status $?"

echo "== the same command again"
"${train[@]}"

# Every start adds one row to metrics.jsonl. The second one names the checkpoint that it resumed from.
grep '"kind": *"start"' runs/quickstart/metrics.jsonl | grep -o '"resumed_from": *[^,}]*'
