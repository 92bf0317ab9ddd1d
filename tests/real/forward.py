"""The other side of every check: log-probs by a plain float32 forward of transformers, in a process of its own.

    python -m tests.real.forward MODEL < sequences.json > logprobs.json

In: a list of token id lists. Out: for each the natural log-prob of every token from the second on, given those before
it in its list. The products are float32, the logarithm of the softmax is float64. Nothing of remit is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def logprobs(model: Path, sequences: list[list[int]]) -> list[np.ndarray]:
    """float64 [tokens - 1] for each sequence, computed by another process; equal sequences are computed once."""
    distinct = list(dict.fromkeys(map(tuple, sequences)))
    answer = subprocess.run(
        [sys.executable, "-m", "tests.real.forward", str(model)],
        input=json.dumps(distinct),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )
    found = dict(zip(distinct, json.loads(answer.stdout)))
    return [np.array(found[tuple(sequence)]) for sequence in sequences]


def main() -> None:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    answers = []
    with torch.inference_mode():
        for sequence in json.load(sys.stdin):
            ids_T = torch.tensor(sequence)
            logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0]
            # a few places at a time: float64 over 262,144 tokens is 2 MB a place
            values = [
                logits_NV.gather(-1, next_N[:, None])[:, 0].double() - logits_NV.double().logsumexp(-1)
                for logits_NV, next_N in zip(logits_TV[:-1].split(32), ids_T[1:].split(32))
            ]
            answers.append(torch.cat([torch.zeros(0, dtype=torch.float64), *values]).tolist())
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
