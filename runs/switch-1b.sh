#!/usr/bin/env bash
# Switch distillation as published (arXiv 2609.01532: a 1B base, a 7B teacher, 60.4B tokens), from a store in place of a teacher
# that runs beside the base; and ReMiT, KD, reverse KL and NTP on the same rows, in the same order, with one flag changed.
#
#   bash runs/switch-1b.sh plan             hours, bytes and break-even against the teacher online
#   bash runs/switch-1b.sh pack             corpus/SOURCE to rows                       CPUs
#   bash runs/switch-1b.sh threshold        the entropy below which a top k is kept     one engine, minutes
#   bash runs/switch-1b.sh score            the teacher's store, once for all arms      GPUs, a Ray cluster
#   bash runs/switch-1b.sh train switch     an arm: switch, remit or ntp                GPUs
#   bash runs/switch-1b.sh eval switch
#   bash runs/switch-1b.sh all              all of it, one after the other
#
# DRY=1 in front prints the commands and runs none. Each step resumes with the same command. STORE=full in front keeps the top k
# of every token, about four times the bytes: kd and rkl need that, and all arms can train from it. Nothing of this has been run
# at this size; docs/recipes.md says what of it is published.
#
# Before: corpus/SOURCE holds the files of each source (.jsonl, .json.gz, .json.zst); docs/published-mixes.md says from where. Of
# dclm some 30 billion tokens are enough. On a cluster, start `score` under docs/jobs/slurm-score.sh, and `train` as one task per
# node: within a Slurm job it launches torchrun with srun.
set -euo pipefail

# -- what is trained from what

# published: OLMo-2-0425-1B before its second stage
BASE=${BASE:-allenai/OLMo-2-0425-1B@stage1-step1907359-tokens4001B}
# published: "7B instruct", also 13B; the release was not found, so the name is ours. Give NAME@COMMIT so that it stays the same.
TEACHER=${TEACHER:-allenai/OLMo-2-1124-7B-Instruct}
# published: FP8. Ours: the teacher's own 16 bits, since it runs once. FP8 as published:
#   TEACHER_ARGS="--no-canary --engine-args quantization=fp8"
read -r -a TEACHER_ARGS <<< "${TEACHER_ARGS:-}"
# published: Dolmino 1124 with these shares of the tokens (they are those of its 50B mix)
SOURCES=(dclm math flan wiki pes2o stackexchange)
declare -A SHARE=([dclm]=0.472 [math]=0.208 [flan]=0.166 [wiki]=0.0711 [pes2o]=0.0585 [stackexchange]=0.0245)
# published: rows of 4,096, BOS and EOS, attention within documents
SEQ_LEN=4096
CONTEXT=document
# published: temperature 2, a gate at 0.2 (0.1 to 0.3 tried), half KL where there is no gate (KD, reverse KL)
TEMPERATURE=2
GATE=${GATE:-0.2}
KD_WEIGHT=0.5
# published: the quantile of one forward pass of one process (SCOPE=micro). Ours: of the whole step.
SCOPE=${SCOPE:-global}
# published: the whole vocabulary. Ours: the k most probable tokens, where docs/objectives.md measures what that costs.
TOP_K=${TOP_K:-32}
# ours: files of a pilot, bytes of text in all; tokens of the mix that the threshold is estimated on are among them
PILOT_BYTES=${PILOT_BYTES:-100000000}
# published: 32 H200
NUM_GPUS=${NUM_GPUS:-32}
STORE=${STORE:-sure}

# -- how it is run

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -n "${LAUNCH:-}" ]; then
    read -r -a LAUNCH <<< "$LAUNCH"
elif [ -n "${SLURM_JOB_NUM_NODES:-}" ]; then
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    LAUNCH=(srun torchrun "--nnodes=$SLURM_JOB_NUM_NODES" --nproc-per-node=8 "--rdzv-id=$SLURM_JOB_ID" --rdzv-backend=c10d
        "--rdzv-endpoint=$head:29500" --no-python)
else
    LAUNCH=(torchrun --nproc-per-node=8 --no-python)
fi

run() {
    printf '%q ' "$@"
    echo
    if [ -z "${DRY:-}" ]; then "$@"; fi
}

# The first lines of every file of a source, so many bytes in all.
pilot_of() {
    local files file
    mapfile -t files < <(find "corpus/$1" -type f | sort)
    for file in "${files[@]}"; do
        case $file in
            *.zst) zstd -dc "$file" ;;
            *.gz) gzip -dc "$file" ;;
            *) cat "$file" ;;
        esac 2> /dev/null | head -c "$(($2 / ${#files[@]} + 20000))" | sed '$d' || true # the reader of the rest has gone
    done
}

plan() {
    local share=(--top-k-share 0.25)
    if [ "$STORE" = full ]; then share=(); fi
    # 56 hours with the teacher and 26 without, on 32 GPUs, as rates: docs/plan.md
    run remit plan --base olmo2-1b --reference olmo2-7b --tokens 60.4B --gpu h200 --num-gpus "$NUM_GPUS" --train-rate 20166 \
        --online-rate 17477 --top-k "$TOP_K" --entropy --entropy-temperature "$TEMPERATURE" "${share[@]}"
}

pack() {
    local source
    for source in "${SOURCES[@]}"; do
        run remit pack --corpus "corpus/$source" --tokenizer "$BASE" --seq-len "$SEQ_LEN" --bos always --out "packed/$source"
    done
}

# One threshold for all sources: the gate is a quantile of whole steps, and sources differ in how sure a teacher is of them.
threshold() {
    local source
    mkdir -p pilot
    for source in "${SOURCES[@]}"; do
        if [ -z "${DRY:-}" ]; then
            pilot_of "$source" "$(awk "BEGIN { printf \"%d\", ${SHARE[$source]} * $PILOT_BYTES }")" > "pilot/$source.jsonl"
        fi
    done
    run remit pack --corpus pilot --tokenizer "$BASE" --seq-len "$SEQ_LEN" --bos always --out packed-pilot
    run remit score --shards packed-pilot --model "$TEACHER" --name teacher --context "$CONTEXT" --top-k "$TOP_K" --entropy \
        --entropy-temperature "$TEMPERATURE" --top-k-below-entropy "quantile:$GATE+0.05" --out scored-pilot "${TEACHER_ARGS[@]}"
}

score() {
    local source below=()
    if [ "$STORE" = sure ]; then
        below=(--top-k-below-entropy NATS)
        if [ -z "${DRY:-}" ]; then
            below[1]=$(python3 -c 'import json; print(json.load(open("scored-pilot/_manifest.json"))["references"]["teacher"]["top_k_below_entropy"])')
        fi
    fi
    for source in "${SOURCES[@]}"; do
        run remit score --shards "packed/$source" --model "$TEACHER" --name teacher --context "$CONTEXT" --top-k "$TOP_K" --entropy \
            --entropy-temperature "$TEMPERATURE" "${below[@]}" --out "scored-$STORE/$source" "${TEACHER_ARGS[@]}"
    done
}

train() {
    local source shards=() own=()
    for source in "${SOURCES[@]}"; do shards+=("scored-$STORE/$source=${SHARE[$source]}"); done
    case $1 in
        switch) own=(--temperature "$TEMPERATURE" --gate-quantile "$GATE" --scope "$SCOPE") ;;
        kd | rkl) own=(--temperature "$TEMPERATURE" --kd-weight "$KD_WEIGHT") ;;
    esac
    run "${LAUNCH[@]}" remit train --config "$here/switch-1b.yaml" --shards "${shards[@]}" --model "$BASE" --reference teacher \
        --objective "$1" "${own[@]}" --out "trained/$1"
}

evaluate() {
    # published: a mean of reasoning and one of recall, whose tasks were not found; ours: those of the ReMiT paper, and recall
    run remit eval --model "trained/$1/model" --suite paper,recall --out "evaluated/$1"
}

arms() {
    if [ "$STORE" = full ]; then echo ntp remit switch kd rkl; else echo ntp remit switch; fi
}

case ${1:-} in
    plan | pack | threshold | score) "$1" ;;
    train) train "${2:?an arm: switch, remit, ntp; with STORE=full also kd, rkl}" ;;
    eval) evaluate "${2:?an arm}" ;;
    all)
        plan
        pack
        if [ "$STORE" = sure ]; then threshold; fi
        score
        for arm in $(arms); do
            train "$arm"
            evaluate "$arm"
        done
        ;;
    *)
        sed -n '2,20p' "${BASH_SOURCE[0]}"
        exit 2
        ;;
esac
