#!/usr/bin/env bash
# Train the quickstart for 200 updates in an empty folder, restore a sentence, and evaluate. Takes about a minute.
#
#   bash examples/train_and_restore.sh FOLDER [--section.key value ...]
#
# Settings after FOLDER are passed to bin/train. After 200 updates the model still restores few terms correctly;
# all 1,000 updates of the quickstart restore 0.997 of them.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$1
shift
mkdir -p "$folder"
cd "$folder"

# The corpus is generated, and the tokenizer and the model are trained from scratch: nothing is downloaded.
"$repository/bin/train" --config "$repository/configs/quickstart.yaml" --schedule.max_updates 200 "$@"

# Each [?] is a gap. All other bytes of the text stay as they are.
echo 'My uncle, 64, has gout. Drug: [?]; dose: [?].' | "$repository/bin/restore" runs/quickstart

# Share of masked terms in held-out notes that are restored exactly, with baselines and a damage curve.
"$repository/bin/evaluate" runs/quickstart --examples 60 --curve_examples 20
