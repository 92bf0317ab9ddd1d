"""The steps of benchmarks.gpu_score, each in a process of its own: one engine each, or the command as users run it."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

import numpy as np

TINY = {"hidden_size": 256, "layers": 4, "heads": 8, "intermediate": 512, "vocabulary": 2051, "positions": 512}
SMALL = TINY | {"intermediate": 1024, "vocabulary": 16_384}
OLMO_2_1B = {
    "hidden_size": 2048, "layers": 16, "heads": 16, "intermediate": 8192, "vocabulary": 100_352, "positions": 4096
}  # fmt: skip
LENGTHS = (512, 2, 3, 97, 511, 256, 257, 33)  # of prompts: whole rows, and documents of any length


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def random_model(folder: Path, shape: dict[str, int]) -> Path:
    """A random OLMo-2 in bfloat16 with predictions that are not uniform, made once."""
    import torch
    import transformers

    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        config = transformers.Olmo2Config(
            vocab_size=shape["vocabulary"], hidden_size=shape["hidden_size"], intermediate_size=shape["intermediate"],
            num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["heads"],
            max_position_embeddings=shape["positions"], tie_word_embeddings=False, bos_token_id=None, eos_token_id=0,
            pad_token_id=None,
        )  # fmt: skip
        with torch.device("cuda" if has_gpu() else "cpu"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(2.0)
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def start_engine(model: Path, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A VllmEngine as an actor makes it, and what its start took."""
    from scorer.engine import EngineConfig, VllmEngine, batched_tokens, device_memory, environment

    device = "cuda" if has_gpu() else "cpu"
    model_config = json.loads((model / "config.json").read_text())
    seq_len, vocabulary = model_config["max_position_embeddings"], model_config["vocab_size"]
    config = EngineConfig(
        model, settings["dtype"], seq_len, vocabulary, "", "", device=device, top_k=settings.get("top_k", 0),
        max_num_batched_tokens=settings.get("tokens"), temperatures=tuple(settings.get("temperatures", ())),
    )  # fmt: skip
    tokens = batched_tokens(config, device_memory(device))
    os.environ.update(environment(config, model_config, sorted(os.sched_getaffinity(0)), tokens))
    began = perf_counter()
    engine = VllmEngine(config, tokens)
    return engine, {"start_seconds": perf_counter() - began, **engine.description}


def answers_to(engine: Any, prompts: list[np.ndarray]) -> list[Any]:
    answers: dict[str, Any] = {}
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt)
    while len(answers) < len(prompts):
        answers.update(engine.step())
    return [answers[str(index)] for index in range(len(prompts))]


def right(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Answers to prompts of many lengths, rows in chunks among them, for `compare` in a process without vLLM."""
    model = random_model(folder / "tiny", TINY)
    engine, result = start_engine(model, settings)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, TINY["vocabulary"], length).astype(np.int32) for length in LENGTHS]
    answers = answers_to(engine, prompts)
    (folder / "answers.pickle").write_bytes(pickle.dumps((prompts, [tuple(answer) for answer in answers], settings)))
    return result


def compare(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Distances of the answers that `right` left from a transformers forward in float32, beside what is allowed."""
    from scorer.canary import compute, measure
    from scorer.engine import Answer
    from scorer.logits import Kept

    prompts, tuples, made_with = pickle.loads((folder / "answers.pickle").read_bytes())
    dtype, top_k = made_with["dtype"], made_with.get("top_k", 0)
    kept = Kept(top_k, tuple(made_with.get("temperatures", ())))
    dtypes = () if dtype == "float32" else (dtype,)
    forwards = compute(folder / "tiny", prompts, kept, dtypes, len(os.sched_getaffinity(0)))
    answers = [Answer(*values) for values in tuples]
    found, limits = measure(answers, forwards.expected), forwards.limits(dtype)
    ratios = [found.mean / limits.mean, abs(found.bias) / limits.bias(found.tokens)]
    ratios += [found.entropy_mean / limits.entropy_mean] if kept.temperatures else []
    ordered = True
    if top_k:
        ratios += [found.topk_mean / limits.topk_mean, found.topk_elsewhere / limits.topk_elsewhere]
        for answer in answers:
            assert answer.topk_ids is not None
            assert answer.topk_logprobs is not None
            falls = answer.topk_logprobs[:, :-1] - answer.topk_logprobs[:, 1:]
            rises = answer.topk_ids[:, 1:] > answer.topk_ids[:, :-1]
            ordered &= bool(((falls > 0) | ((falls == 0) & rises)).all())
    return {"mean": found.mean, "bias": found.bias, "max": found.max, "share_of_limit": max(ratios), "ordered": ordered}


class LeastFreeMemory:
    """Bytes by which a GPU's free memory fell at most while the block ran; 0 without a GPU."""

    def __enter__(self) -> "LeastFreeMemory":
        self.taken, self._stop = 0, threading.Event()
        if has_gpu():
            import torch

            self._before = torch.cuda.mem_get_info()[0]
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        import torch

        while not self._stop.wait(0.02):
            self.taken = max(self.taken, self._before - torch.cuda.mem_get_info()[0])

    def __exit__(self, *error: object) -> None:
        self._stop.set()


def fast(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds for the same rows: scored; prefilled without log-probs; the bare product with the output embedding."""
    import torch
    import vllm

    shape = OLMO_2_1B if has_gpu() else SMALL
    model = random_model(folder / "large", shape)
    engine, result = start_engine(model, settings)
    rows, seq_len = settings["rows"], shape["positions"]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, shape["vocabulary"], seq_len).astype(np.int32) for _ in range(rows)]
    answers_to(engine, prompts[:2])
    with LeastFreeMemory() as memory:
        began = perf_counter()
        answers_to(engine, prompts)
        scored = perf_counter() - began
    bare = vllm.SamplingParams(max_tokens=1, temperature=0, detokenize=False)

    def prefill(wanted: list[np.ndarray]) -> float:
        began = perf_counter()
        for index, prompt in enumerate(wanted):
            engine._engine.add_request(f"bare-{index}", {"prompt_token_ids": prompt.tolist()}, bare)
        done = 0
        while done < len(wanted):
            done += sum(output.finished for output in engine._engine.step())
        return perf_counter() - began

    prefill(prompts[:2])
    prefilled = prefill(prompts)
    device = "cuda" if has_gpu() else "cpu"
    states = torch.randn(1024, shape["hidden_size"], device=device, dtype=torch.bfloat16)
    head = torch.randn(shape["vocabulary"], shape["hidden_size"], device=device, dtype=torch.bfloat16)
    if device == "cpu":
        states, head = states.float(), head.float()
    product = lambda: torch.mm(states, head.T, out_dtype=torch.float32) if has_gpu() else states @ head.T  # noqa: E731
    head_seconds = seconds_of(product) * rows * seq_len / 1024
    result |= {"rows": rows, "tokens": rows * seq_len, "score_seconds": scored, "prefill_seconds": prefilled}
    result |= {"head_seconds": head_seconds, "memory_beyond_gib": memory.taken / 2**30}
    result["flops_per_token"] = flops_per_token(shape)
    result["matmul_tflops"] = matmul_tflops(device)
    return result


def flops_per_token(shape: dict[str, int]) -> float:
    """Of one forward: twice the weights, and products of the causal attention at half the row on average."""
    hidden, layers = shape["hidden_size"], shape["layers"]
    weights = layers * (4 * hidden * hidden + 3 * hidden * shape["intermediate"]) + shape["vocabulary"] * hidden
    return 2 * weights + layers * 4 * hidden * shape["positions"] / 2


def matmul_tflops(device: str) -> float:
    """TFLOP/s of a large bfloat16 product, the most that this device was seen to do."""
    import torch

    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right) / 1e12


def seconds_of(call: Any, repeat: int = 10) -> float:
    """Seconds of a call on its device, after three to warm up."""
    import torch

    for _ in range(3):
        call()
    if has_gpu():
        torch.cuda.synchronize()
    began = perf_counter()
    for _ in range(repeat):
        call()
    if has_gpu():
        torch.cuda.synchronize()
    return (perf_counter() - began) / repeat


def canary(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds of the forwards that engines are compared with, at the large shape."""
    from scorer.canary import SHORT_TOKENS, compute
    from scorer.logits import Kept

    shape = OLMO_2_1B if settings["large"] else SMALL
    model = random_model(folder / "large", shape)
    rng = np.random.default_rng(0)
    lengths = (shape["positions"], SHORT_TOKENS, SHORT_TOKENS, SHORT_TOKENS)
    prompts = [rng.integers(1, shape["vocabulary"], length).astype(np.int32) for length in lengths]
    began = perf_counter()
    compute(model, prompts, Kept(), ("bfloat16",), len(os.sched_getaffinity(0)))
    return {"canary_seconds": perf_counter() - began}


def command(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`remit score` twice over one folder, the first time with an engine killed; who listened; do the runs agree."""
    from benchmarks.common import make_shards
    from shards import ShardFolder

    model, shards = random_model(folder / "tiny", TINY), folder / "shards"
    make_shards(shards, TINY["vocabulary"], 6, 256 if has_gpu() else 16, TINY["positions"])
    began = perf_counter()
    listening, killed = score_command(shards, model, folder / "first", kill=True)
    first_seconds = perf_counter() - began
    score_command(shards, model, folder / "second", kill=False)
    verified = subprocess.run(remit("verify", "--shards", str(folder / "first")), capture_output=True, text=True)
    values: list[np.ndarray] = []
    for name in ("first", "second"):
        scored = ShardFolder(folder / name)
        columns = [
            scored.open_part(plan.name).get_batch(batch).column("rl_logprobs").flatten().to_numpy(zero_copy_only=False)
            for plan in scored.manifest.parts
            for batch in range(scored.open_part(plan.name).num_record_batches)
        ]
        values.append(np.concatenate(columns))
    parts = [plan.name for plan in ShardFolder(shards).manifest.parts]
    same = sum((folder / "first" / part).read_bytes() == (folder / "second" / part).read_bytes() for part in parts)
    difference = np.abs(values[0] - values[1])
    return {
        "engine_killed": killed, "verify_exit_code": verified.returncode, "first_seconds": first_seconds,
        "listeners_beyond_loopback": sorted(listening), "same_parts": f"{same} of {len(parts)}",
        "difference_mean": float(np.nanmean(difference)), "difference_max": float(np.nanmax(difference)),
    }  # fmt: skip


def remit(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *arguments]


def score_command(shards: Path, model: Path, out: Path, kill: bool) -> tuple[set[str], bool]:
    """Run it to its end; who listened beyond loopback, and whether an engine was killed after the first part."""
    arguments = remit("score", "--shards", str(shards), "--model", str(model), "--out", str(out), "--num-engines", "1")
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen([*arguments, "--dtype", "bfloat16"], stdout=log, stderr=log)
        listening: set[str] = set()
        killed, deadline = False, monotonic() + 240
        while process.poll() is None and monotonic() < deadline:
            running = descendants(process.pid)
            listening |= listeners(set(running))
            engines = [pid for pid, text in running.items() if "ray::ScoringActor" in text]
            if kill and not killed and engines and list(out.glob("_commits/part-*.json")):
                os.kill(engines[0], signal.SIGKILL)
                killed = True
            sleep(0.2)
        if process.poll() is None:
            process.terminate()
    if process.wait() != 0:
        raise RuntimeError(f"remit score ended with {process.returncode}: {Path(f'{out}.log').read_text()[-1500:]}")
    return listening, killed


def descendants(root: int) -> dict[int, str]:
    """Command lines of a process and of all that descend from it, by pid."""
    parents, texts = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            texts[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: texts.get(pid, "") for pid in found}


def listeners(pids: set[int]) -> set[str]:
    """Programs and local addresses of TCP sockets on which one of these processes listens beyond loopback."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address = fields[1].rpartition(":")[0]
            is_loopback = (
                address == "0100007F" or address == "0" * 24 + "01000000" or address.endswith("FFFF00000100007F")
            )
            if fields[3] == "0A" and not is_loopback:
                sockets[f"socket:[{fields[9]}]"] = fields[1]
    found = set()
    for pid in pids:
        try:
            program = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:60]
            targets = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        found |= {f"{re.sub(' +', ' ', program)} {sockets[target]}" for target in targets if target in sockets}
    return found
