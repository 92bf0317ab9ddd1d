"""What ReMiT and the other objectives cost beside next-token prediction, against an online reference, and against
transformers' Trainer.

    python -m benchmarks.bench_train        (make bench-train; about twenty minutes on two cores)

Variants take turns step by step in one process; only the comparison with transformers' Trainer, whose peak memory
counts, runs each side in a process of its own, several times in turn.
"""

import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.common import Claim, claim, make_model, make_shards, report

SEQ_LEN = 1024
TOP_K = 32
WHAT = ["variants", "objectives", "trainer"]


def ours(model: Path, shards: Path, steps: int, rows: int) -> None:
    """Print tokens/s and peak memory of our next-token prediction."""
    import torch

    from benchmarks.training import Steps
    from shards import ShardFolder
    from trainer.loss_model import peak_memory_bytes

    trainer = Steps(ShardFolder(shards), model, "ntp", rows, rows, steps + 1, torch.device("cpu"))
    trainer.step()
    seconds = sum(trainer.step() for _ in range(steps))
    print("OURS", steps * rows * SEQ_LEN / seconds, peak_memory_bytes(torch.device("cpu")), flush=True)


def theirs(model: Path, shards: Path, steps: int, rows: int) -> None:
    """Print the same of transformers' Trainer with its own loss, same rows, same optimizer."""
    import tempfile

    import torch
    import transformers

    from trainer.dataset import RowDataset
    from trainer.loss_model import peak_memory_bytes

    class Clock(transformers.TrainerCallback):
        began = 0.0

        def on_step_end(self, args, state, control, **rest):  # type: ignore[no-untyped-def]
            if state.global_step == 1:
                self.began = perf_counter()

        def on_train_end(self, args, state, control, **rest):  # type: ignore[no-untyped-def]
            seconds = perf_counter() - self.began
            print("THEIRS", steps * rows * SEQ_LEN / seconds, peak_memory_bytes(torch.device("cpu")), flush=True)

    def collate(items):  # type: ignore[no-untyped-def]
        ids = torch.tensor([item.input_ids.tolist() for item in items])
        return {"input_ids": ids, "labels": ids}

    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(
            out, max_steps=steps + 1, per_device_train_batch_size=rows, use_cpu=True, report_to=[], save_strategy="no",
            remove_unused_columns=False, disable_tqdm=True, optim="adamw_torch_fused", logging_strategy="no",
            weight_decay=0.1, learning_rate=1e-5,
        )  # fmt: skip
        transformers.Trainer(
            transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), arguments,
            train_dataset=RowDataset(shards, None), data_collator=collate, callbacks=[Clock()],
        ).train()  # fmt: skip


def measured(kind: str, *arguments: object) -> tuple[float, float]:
    """What a subprocess of this script prints."""
    command = [sys.executable, "-m", "benchmarks.bench_train", "--only", kind, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, stderr=subprocess.DEVNULL)
    line = next(line for line in done.stdout.splitlines() if line.startswith(kind.upper()))
    speed, peak = line.split()[1:]
    return float(speed), float(peak)


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="pairs of steps")
    parser.add_argument("--rounds", type=int, default=2, help="of the comparison with transformers' Trainer")
    parser.add_argument("--vocabulary", type=int, default=100_352)
    parser.add_argument("--rows", type=int, default=4, help="rows of 1024 tokens per step")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, help="comparisons to make")
    parser.add_argument("--only", choices=("ours", "theirs"), help="used by the script itself")
    parser.add_argument("paths", nargs="*", type=Path)
    options = parser.parse_args()
    if options.only:
        (ours if options.only == "ours" else theirs)(*options.paths, 3, options.rows)
        return 0
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", options.vocabulary)
        make_shards(folder / "packed", options.vocabulary, 4, 4 * options.rows, SEQ_LEN)
        claims = variants(folder, model, options.steps, options.rows) if "variants" in options.what else []
        if "objectives" in options.what:
            claims += objectives(folder, model, options.steps, options.rows)
        speeds, peaks, last = [], [], (0.0, 0.0)
        for index in range(options.rounds if "trainer" in options.what else 0):
            common = (model, folder / "packed", "--vocabulary", options.vocabulary, "--rows", options.rows)
            own, other = measured("ours", *common), measured("theirs", *common)
            speeds.append(own[0] / other[0])
            peaks.append(own[1] / other[1])
            last = own[1] / 1e9, other[1] / 1e9
            print(f"round {index}: tokens/s {own[0]:,.0f} and {other[0]:,.0f}, peak GB {last[0]:.2f} and {last[1]:.2f}")
    if speeds:
        text = f"NTP / transformers' Trainer, {options.vocabulary:,} tokens of vocabulary, tokens/s"
        claims += [claim(text, speeds, 1.3), claim("the same, peak memory", peaks, at_most=0.5)]
    return report("train", claims)


def variants(folder: Path, model: Path, num_steps: int, rows: int) -> list[Claim]:
    """NTP, ReMiT from the stored and from an online reference: steps in turn, on the same rows."""
    import torch

    from benchmarks.training import Steps, annotate
    from trainer.model import load_base

    device = torch.device("cpu")
    shards = annotate(folder / "packed", folder / "scored")
    common = (rows, rows, 2 * num_steps + 2, device)
    trainers = {
        "ntp": Steps(shards, model, "ntp", *common),
        "remit": Steps(shards, model, "remit", *common),
        "online": Steps(shards, model, "remit", *common, online=load_base(model, "float32", device)),
    }
    for trainer in trainers.values():
        trainer.step()
        trainer.waited = trainer.seconds = 0.0
    cost, kept = [], []
    for index in range(num_steps):
        order = list(trainers) if index % 2 else list(reversed(trainers))  # who comes first gains nothing
        seconds = {name: trainers[name].step() for name in order}
        cost.append(seconds["remit"] / seconds["ntp"])
        kept.append(seconds["ntp"] / seconds["online"])
        print(f"step {index}: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()), flush=True)
    remit = trainers["remit"]
    remit.waited = remit.seconds = 0.0
    for _ in range(num_steps // 2):  # in a row: beside others' steps there is more time to read
        remit.step()
    return [
        claim("ReMiT step / NTP step", cost, at_most=1.01),
        claim("throughput kept against NTP, ReMiT from the shards", [1 / value for value in cost], 0.99),
        claim("throughput kept against NTP, reference online (paper: 0.57)", kept),
        claim("share of the time that ReMiT waits for data", [remit.waited / remit.seconds], at_most=0.01),
    ]


def objectives(folder: Path, model: Path, num_steps: int, rows: int) -> list[Claim]:
    """RHO-1, distillation and the switch against NTP: steps in turn, on the same rows."""
    import torch

    from benchmarks.training import Steps, annotate

    shards, device = annotate(folder / "packed", folder / "top", top_k=TOP_K, temperature=2.0), torch.device("cpu")
    # name: (objective, rows of a micro-batch, settings, the claim and its target)
    kinds: dict[str, tuple] = {
        "rho1 row": ("rho1", rows, {"scope": "row"}, "RHO-1, scope row / NTP step", 1.02),
        "rho1 micro": ("rho1", rows, {"scope": "micro"}, f"RHO-1, scope micro ({rows} rows) / NTP step", 1.02),
        "rho1 global": ("rho1", 1, {"scope": "global"}, f"RHO-1, scope global, {rows} micro-batches / NTP step", None),
        "kd": ("kd", rows, {}, f"KD, k = {TOP_K} / NTP step", 1.25),
        "rkl": ("rkl", rows, {}, f"reverse KL, k = {TOP_K} / NTP step", 1.3),
        "rkl 2": ("rkl", rows, {"temperature": 2.0}, f"reverse KL at temperature 2, k = {TOP_K} / NTP step", 1.3),
        "switch": ("switch", rows, {}, f"switch at temperature 2, k = {TOP_K} / NTP step", 1.3),
    }
    claims = []
    for name, (objective, micro_batch_size, settings, text, target) in kinds.items():  # two models in memory at a time
        common = (rows, micro_batch_size, num_steps + 1, device)
        plain, other = Steps(shards, model, "ntp", *common), Steps(shards, model, objective, *common, **settings)
        plain.step()
        other.step()
        ratios = []
        for index in range(num_steps):
            pair = (plain, other) if index % 2 else (other, plain)
            seconds = {id(trainer): trainer.step() for trainer in pair}
            ratios.append(seconds[id(other)] / seconds[id(plain)])
            print(f"{name} {index}: {seconds[id(other)]:.2f} s, ntp {seconds[id(plain)]:.2f} s", flush=True)
        claims.append(claim(text, ratios, at_most=target))
    return claims


if __name__ == "__main__":
    sys.exit(main())
