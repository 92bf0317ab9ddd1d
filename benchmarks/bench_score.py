"""How fast remit score is against its own ceiling, against transformers, and with a second engine.

    python -m benchmarks.bench_score        (make bench-score; about six minutes on two cores)

Ceiling: what the same engine needs for the prefill without log-probs, plus the bare matrix product of the output
embedding for every token. Both are timed in turn with the scoring of a part, in the same process on the same core.
"""

import os
import shutil
import subprocess
import sys
import threading
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from benchmarks.common import Claim, PeakMemory, claim, make_model, make_shards, report, write_tokenizer

SEQ_LEN, ROWS_PER_PART = 1024, 16


def measurable_engine(config: Any, tokens: int, vocabulary: int) -> Any:
    """A VllmEngine whose `mode` decides what it does with a prompt: score it, prefill it only, or multiply the head."""
    import numpy as np
    import torch
    import vllm

    from scorer.cpu_head import CpuHead
    from scorer.engine import Answer, VllmEngine

    head = torch.randn(vocabulary, 256, dtype=torch.bfloat16)
    states = torch.randn(SEQ_LEN, 256, dtype=torch.bfloat16)
    product = CpuHead()  # as the engine's: logits are float32, whatever its dtype
    bare = vllm.SamplingParams(max_tokens=1, temperature=0, detokenize=False)

    class Measurable(VllmEngine):
        mode = "score"

        def add(self, key: str, prompt: Any) -> None:
            if self.mode == "score":
                return super().add(key, prompt)
            self._asked[key] = prompt
            if self.mode == "prefill":
                self._engine.add_request(key, {"prompt_token_ids": prompt.tolist()}, bare)
            return None

        def step(self) -> list:
            if self.mode == "score":
                return super().step()
            if self.mode == "prefill":
                done = [output.request_id for output in self._engine.step() if output.finished]
            else:
                done = list(self._asked)
                with torch.inference_mode():
                    for _ in done:
                        product(states, head)
            return [(key, Answer(np.zeros(len(self._asked.pop(key)) - 1, np.float32))) for key in done]

    return Measurable(config, tokens)


def ceiling(model: Path, shards_folder: Path, out_folder: Path, vocabulary: int, rounds: int) -> None:
    """Print, per round: seconds of prefill, of the head, of scoring as many tokens; all in the engine's own thread."""
    import numpy as np

    import scorer.actor
    from scorer.actor import ScoringActor, ScoringTask
    from scorer.engine import EngineConfig, batched_tokens, device_memory, environment
    from scorer.engine_thread import Job
    from shards import Manifest, ShardFolder
    from shards.fingerprint import config_fingerprint, weights_fingerprint

    core = sorted(os.sched_getaffinity(0))[0]
    os.sched_setaffinity(0, {core})
    shards = ShardFolder(shards_folder)
    reference = {"rl": {"context": "packed", "logprob_step": 1 / 64}}
    replace(shards.manifest, references=reference).write(out_folder)
    write_tokenizer(out_folder)
    config = EngineConfig(model, "bfloat16", SEQ_LEN, vocabulary, weights_fingerprint(model), config_fingerprint(model))
    tokens = batched_tokens(config, device_memory("cpu"))
    shape = {"num_attention_heads": 8, "hidden_size": 256, "num_hidden_layers": 4}
    os.environ.update(environment(config, shape, [core], tokens))
    scorer.actor.make_engine = lambda *rest: measurable_engine(config, tokens, vocabulary)  # type: ignore[assignment]
    task = ScoringTask(str(shards_folder), str(out_folder), (0, ""), "rl", "packed", 1 / 64, vocabulary)
    actor = ScoringActor(config, shape, 1, task)
    actor.start()
    loop = actor._loop
    engine: Any = loop._engine
    rows = [np.asarray(row) for row in shards.open_part("part-00000.arrow").get_batch(0)["input_ids"].to_pylist()]
    parts = [plan.name for plan in Manifest.read(out_folder).parts]
    parts_per_round = len(parts) // (rounds + 1)

    def through(mode: str) -> None:
        engine.mode = mode
        job = Job()
        for index in range(parts_per_round * ROWS_PER_PART):
            loop.submit(job, index, rows[index % len(rows)])
        loop.wait(job)
        engine.mode = "score"

    def score(waiting: list[str]) -> None:
        def work() -> None:
            while waiting:
                actor.score_part(waiting.pop(0))

        threads = [threading.Thread(target=work) for _ in range(2)]  # as the driver keeps two parts with each engine
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    for index in range(rounds + 1):  # the first round warms up
        waiting = parts[index * parts_per_round : (index + 1) * parts_per_round]
        seconds = []
        for call in (lambda: through("prefill"), lambda: through("head"), lambda todo=waiting: score(todo)):
            began = perf_counter()
            call()
            seconds.append(perf_counter() - began)
        if index:
            print("CEILING", *seconds, flush=True)
    os._exit(0)


def forward(model: Path, shards_folder: Path, rounds: int) -> None:
    """Print tokens/s of a transformers forward with log-softmax on all cores."""
    import torch
    import transformers

    from shards import ShardFolder

    rows = ShardFolder(shards_folder).open_part("part-00000.arrow").get_batch(0)["input_ids"].to_pylist()
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    ids = torch.tensor(rows)
    with torch.inference_mode():
        for index in range(rounds + 1):
            began = perf_counter()
            for start in range(0, len(rows), 4):
                chunk = ids[start : start + 4]
                logprobs = network(chunk, use_cache=False).logits[:, :-1].float().log_softmax(-1)
                logprobs.gather(-1, chunk[:, 1:, None])
            if index:
                print("FORWARD", ids.numel() / (perf_counter() - began), flush=True)


def scored_tokens_per_second(shards_folder: Path, model: Path, out: Path, engines: int) -> tuple[float, float]:
    """Of remit score with that many one-core engines: tokens/s, and the share of it that is reading and writing.

    All its processes have as many cores as there are engines, so that the driver of one has none for itself either.
    """
    import ray

    from scorer.config import ScoreConfig
    from scorer.reference import Reference
    from scorer.score import score
    from scorer.telemetry import ScoreProgress

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:engines])
    ray.init(
        address="local", num_cpus=engines, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1"
    )
    states: list[tuple[float, int]] = []
    last: list[ScoreProgress] = []

    def progress(state: ScoreProgress) -> None:
        last[:] = [state]
        # from when each engine has warmed up on a part
        if state.engines == engines and state.tokens >= engines * ROWS_PER_PART * SEQ_LEN:
            states.append((perf_counter(), state.tokens))

    try:
        score(
            ScoreConfig(str(shards_folder), str(model), str(out), num_engines=engines, dtype="bfloat16"),
            Reference(model, "bench"),
            progress,
        )
    finally:
        ray.shutdown()
        os.sched_setaffinity(0, cores)
    # until the first had nothing left to do
    (first, tokens_first), (final, tokens_final) = states[0], states[-1]
    beside = (last[0].read_seconds + last[0].write_seconds) / (engines * (final - first))
    return (tokens_final - tokens_first) / (final - first), beside


def memory(model: Path, folder: Path, vocabulary: int, tokens_millions: list[int]) -> list[tuple[int, float]]:
    """Peak memory of driver and actor in bytes, and tokens/s, for ever larger folders; the fake engine stands in."""
    from scorer.cluster import ray_cluster
    from scorer.config import ScoreConfig
    from scorer.reference import Reference
    from scorer.score import score

    peaks = []
    with ray_cluster():
        for millions in tokens_millions:
            shards = folder / f"shards-{millions}"
            make_shards(shards, vocabulary, millions, 2**20 // SEQ_LEN, SEQ_LEN)
            began = perf_counter()
            with PeakMemory() as watched:
                settings = ScoreConfig(
                    str(shards), str(model), str(folder / f"out-{millions}"), num_engines=1, engine="fake"
                )
                score(settings, Reference(model, "bench"))
            peaks.append((watched.peak, millions * 2**20 / (perf_counter() - began)))
            shutil.rmtree(shards)
            shutil.rmtree(folder / f"out-{millions}")
    return peaks


def lines(kind: str, *arguments: object) -> list[list[float]]:
    """What a subprocess of this script prints."""
    command = [sys.executable, "-m", "benchmarks.bench_score", "--only", kind, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, stderr=subprocess.DEVNULL)
    prefix = kind.upper()
    return [
        [float(value) for value in line.split()[1:]] for line in done.stdout.splitlines() if line.startswith(prefix)
    ]


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--grow", type=int, nargs="*", default=[4, 200], help="million tokens; none: skip it")
    parser.add_argument("--only", choices=("ceiling", "forward"), help="used by the script itself")
    parser.add_argument("paths", nargs="*", type=Path)
    options = parser.parse_args()
    if options.only == "ceiling":
        ceiling(*options.paths, options.vocabulary, options.rounds)
    elif options.only == "forward":
        forward(*options.paths, options.rounds)
    if options.only:
        return 0
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", options.vocabulary)
        make_shards(folder / "shards", options.vocabulary, 4 * (options.rounds + 1), ROWS_PER_PART, SEQ_LEN)
        common = ("--rounds", options.rounds, "--vocabulary", options.vocabulary)
        own = lines("ceiling", model, folder / "shards", folder / "ceiling", *common)
        one, two, reference, beside = [], [], [], []
        for index in range(options.rounds):
            speed, _ = scored_tokens_per_second(folder / "shards", model, folder / f"one-{index}", 1)
            one.append(speed)
            speed, share = scored_tokens_per_second(folder / "shards", model, folder / f"two-{index}", 2)
            two.append(speed)
            beside.append(share)
            reference.append(
                median(value for values in lines("forward", model, folder / "shards", *common) for value in values)
            )
            print(
                f"round {index}: one engine {one[-1]:,.0f}, two {two[-1]:,.0f}, transformers {reference[-1]:,.0f} tokens/s"
            )
        peaks = memory(model, folder, options.vocabulary, options.grow)
    claims: list[Claim] = [
        claim(
            "scorer, two one-core engines / transformers forward, two cores",
            [a / b for a, b in zip(two, reference)],
            1.2,
        ),
        claim("scorer / ceiling of its engine, one core", [(bare + head) / ours for bare, head, ours in own], 0.9),
        claim("two one-core engines / one", [a / b for a, b in zip(two, one)], 1.8),
        claim("reading and writing parts / time of the engines, beside them", beside, at_most=0.02),
        claim("tokens/s, two engines", two),
    ]
    if peaks:
        grown = f"memory of score, {options.grow[-1]}M tokens / {options.grow[0]}M"
        claims.append(claim(grown, [peaks[-1][0] / peaks[0][0]], at_most=1.1))
        claims.append(claim("memory of score without a model, MB", [peak / 1e6 for peak, _ in peaks]))
        claims.append(claim("tokens/s of all but the engine (fake engine)", [peaks[-1][1]]))
    return report("score", claims)


if __name__ == "__main__":
    sys.exit(main())
