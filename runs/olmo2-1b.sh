#!/usr/bin/env bash
# OLMo 2 1B, mid-trained on the 50B tokens of its own stage 2, with next-token prediction and with ReMiT: one machine, 8 H100.
#
# From `remit plan` (its assumptions; nothing of this has been run):
#   score once: 12.5 h, 100 GPU-hours
#   train NTP: 33.1 h, 265 GPU-hours
#   train ReMiT, stored log-probs: 33.4 h, 268 GPU-hours
#   disk of both shard folders: 280 GB
#   memory: 52 GB per GPU
# Beside it: 200 GB for the token ids as downloaded, 20 GB for each of two checkpoints per run.
#
# Needs `pip install '.[gpu,eval]'`, a token of the hub for the tasks' data and the last lines (hf auth login), and
# CUDA_VISIBLE_DEVICES with 8 GPUs. The same command again goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-work-olmo2-1b}
HUB=${HUB:-}   # OWNER on the hub to push the results to; empty: nothing is pushed
# the checkpoint at the end of stage 1, and the model that SFT, DPO and RL made of its stage 2
BASE=allenai/OLMo-2-0425-1B@stage1-step1907359-tokens4001B
REFERENCE=allenai/OLMo-2-0425-1B-Instruct
mkdir -p "$WORK"

# 0. What it costs
remit plan --base olmo2-1b --reference olmo2-1b --tokens 50B --gpu h100 --num-gpus 8 --global-batch-size 512

# 1. The token ids that the published run trained on: the files that its configuration lists (docs/published-mixes.md)
curl --fail --silent --show-error --location --output "$WORK/stage2.yaml" \
    https://raw.githubusercontent.com/allenai/OLMo/main/configs/official-0425/OLMo2-1B-stage2-seed42.yaml
grep -oE 'https?://olmo-data\.org/[^" ]+\.npy' "$WORK/stage2.yaml" | sort -u > "$WORK/files.txt"
wget --continue --no-verbose --force-directories --no-host-directories --directory-prefix "$WORK/ids" \
    --input-file "$WORK/files.txt"

# 2. Rows of 4,096. Larger parts than by default: 3,000 files instead of 12,000, which the hub likes better
remit pack --corpus "$WORK/ids" --tokenizer "$BASE" --out "$WORK/packed" --tokens-dtype uint32 --on-missing-eos append \
    --tokens-per-shard 16777216
remit pack --corpus Salesforce/wikitext:wikitext-103-raw-v1:validation --tokenizer "$BASE" --out "$WORK/heldout"

# 3. The reference's log-prob of every token, once
remit score --shards "$WORK/packed" --model "$REFERENCE" --name rl --out "$WORK/scored"
remit verify "$WORK/scored"
remit verify "$WORK/scored" --model "$REFERENCE" --rows 64

# 4. The published recipe, twice on the same rows
torchrun --standalone --nproc-per-node 8 --no-python remit train --config docs/recipes/olmo2-1b.yaml --objective ntp \
    --shards "$WORK/scored" --model "$BASE" --out "$WORK/ntp" --eval-shards "$WORK/heldout" --eval-every 1000
torchrun --standalone --nproc-per-node 8 --no-python remit train --config docs/recipes/olmo2-1b.yaml --objective remit \
    --reference rl --shards "$WORK/scored" --model "$BASE" --out "$WORK/remit" --eval-shards "$WORK/heldout" --eval-every 1000

# 5. The paper's ten tasks and recall of facts; HumanEval and MBPP run what the model writes: --allow-code-execution, in a container
remit eval --model "$WORK/ntp/model" --suite paper,recall --backend vllm --out "$WORK/results"
remit eval --model "$WORK/remit/model" --suite paper,recall --backend vllm --out "$WORK/results" \
    --compare "$WORK"/results/ntp-*/results.json
remit compare "$WORK/ntp" "$WORK/remit"
remit report --run "$WORK/ntp" "$WORK/remit" --out "$WORK/report.html"

# 6. For others: the scored corpus as a dataset, the models with their cards; private until you make them public
if [ -n "$HUB" ]; then
    remit push "$WORK/scored" "$HUB/olmo2-1b-stage2-scored"
    remit push "$WORK/ntp" "$HUB/olmo2-1b-ntp" --results "$WORK"/results/ntp-*/results.json
    remit push "$WORK/remit" "$HUB/olmo2-1b-remit" --results "$WORK"/results/remit-*/results.json
fi
