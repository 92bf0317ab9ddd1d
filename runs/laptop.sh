#!/usr/bin/env bash
# What `make score train` does, in one page: build a toy project, pack its corpus, score it with the reference, train twice.
# About ten minutes on two cores, without a GPU or a download of models. First `make install`, or `pip install '.[cpu]'`.
# The same command again goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

# a corpus of word problems and plain text, a tokenizer, a base, and a reference that is better at arithmetic
test -e .cache/sample/reference || python -P -m pipelines.sample --out .cache/sample

# rows of 256 token ids, then one column more: the reference's log-prob of every token
remit pack --corpus .cache/sample/corpus --tokenizer .cache/sample/tokenizer --out work/packed --seq-len 256 \
    --tokens-per-shard 131072
remit score --shards work/packed --model .cache/sample/reference --name rl --out work/scored
remit verify work/scored

# rows that no run trains on
remit pack --corpus .cache/sample/heldout --tokenizer .cache/sample/tokenizer --out work/heldout --seq-len 256

# the same base on the same rows, with plain next-token prediction and with ReMiT
remit train --objective ntp --out work/run-ntp --shards work/scored --model .cache/sample/base --global-batch-size 32 \
    --micro-batch-size 32 --learning-rate 1e-3 --eval-shards work/heldout --eval-every 37
remit train --objective remit --reference rl --out work/run --shards work/scored --model .cache/sample/base \
    --global-batch-size 32 --micro-batch-size 32 --learning-rate 1e-3 --eval-shards work/heldout --eval-every 37

# which of the two predicts the held-out rows better, and a page to look at
remit compare work/run-ntp work/run
remit report --run work/run-ntp work/run --out work/report.html
