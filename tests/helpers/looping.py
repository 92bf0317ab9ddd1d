"""A loop whose stages are quick stand-ins: what the tests of the flywheel share.

`python looping.py MODULE COMMAND --option value ...` stands in for a stage of remit: it reads what it is given, writes a
result that is a function of it, and goes on in a half-written folder like the real one. It notes each start in
$FAKE/starts, and while $FAKE/hold-COMMAND exists it waits for it to go.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

STEPS = 3


def content(path: Path) -> str:
    """Of a file or folder, without what the real stages do not count."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        if file.name[0] not in "._":
            digest.update(file.read_bytes())
    return digest.hexdigest()


def stand_in(command: str, words: list[str]) -> int:
    fake, asked = Path(os.environ["FAKE"]), {"stop": False}
    signal.signal(signal.SIGTERM, lambda *_: asked.update(stop=True))
    with open(fake / "starts", "a") as starts:
        starts.write(f"{command} {os.getpid()}\n")
    options: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            options[word] = []
        else:
            options[list(options)[-1]].append(word)
    out = Path(options.pop("--out")[0])
    for unkeyed in ("--checkpoint-every", "--tokenizer"):
        options.pop(unkeyed, None)
    seen = json.dumps(
        [[k, [content(Path(v)) if os.path.exists(v) else v for v in vs]] for k, vs in sorted(options.items())]
    )
    out.mkdir(parents=True, exist_ok=True)
    progress = out / "progress.txt"
    while True:  # as a real stage goes on where its checkpoints end
        steps = progress.read_text().splitlines() if progress.exists() else []
        if len(steps) == STEPS:
            break
        with open(progress, "a") as file:
            file.write(f"{hashlib.sha256(f'{len(steps)} {seen}'.encode()).hexdigest()}\n")
        while (fake / f"hold-{command}").exists():
            if asked["stop"]:
                return 3
            time.sleep(0.02)
    if command in ("train", "rmt"):
        model = out / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(options["--model"][0], model)
        (model / "made_of.json").write_text(json.dumps(progress.read_text()))
    if command == "eval":
        (out / "m-1").mkdir(exist_ok=True)
        task = {
            "value": 0.5,
            "stderr": 0.1,
            "label": "capitals",
            "metric": "acc",
            "shots": {"capitals": 0},
        }
        task["settings"] = {"num_fewshot": None}
        values = {"suite": None, "tasks": {"capitals": task}, "settings": {"limit": None}, "left_out": []}
        (out / "m-1" / "results.json").write_text(json.dumps(values))
    return 0


def starts(fake: Path) -> list[str]:
    """Commands in the order of their starts."""
    if not (fake / "starts").exists():
        return []
    return [line.split()[0] for line in (fake / "starts").read_text().splitlines()]


OWN = """
set -e
echo "own $$" >> "$FAKE/starts"
test -z "$(ls -A "$REMIT_OUTPUT")"
echo "round $REMIT_ROUND seed $REMIT_SEED" >> "$REMIT_STATE/attempts"
while test -e "$FAKE/hold-own"; do sleep 0.02; done
cp "$REMIT_MODEL"/* "$REMIT_OUTPUT"/
cp "$REMIT_TOKENIZER/tokenizer.json" "$REMIT_OUTPUT"/
echo "$REMIT_ROUND $REMIT_SEED $(cat "$1")" > "$REMIT_OUTPUT"/own.txt
wc -l < "$REMIT_STATE/attempts"
"""


class FakeLoop:
    """A folder with a flywheel.yaml whose stages are stand-ins; `values` may be changed before `write`."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        (folder / "corpus.jsonl").write_text('{"text": "a"}\n')
        (folder / "own.sh").write_text(OWN)
        (folder / "prompts.txt").write_text("prompts\n")
        launcher = [sys.executable, "-I", "-S", __file__]
        self.values: dict = {
            "base": str(base),
            "corpus": [str(folder / "corpus.jsonl")],
            "out": str(self.out),
            "seq_len": 64,
            "rounds": 1,
            "seed": 7,
            "train": {"max_steps": 5},
            "launch": dict.fromkeys(("pack", "score", "train", "rmt", "evaluate"), launcher),
            "posttrain": [{"command": ["bash", str(folder / "own.sh"), str(folder / "prompts.txt")], "name": "own"}],
            "evaluate": {"tasks": "capitals"},
        }
        self.file = self.write()

    def write(self) -> Path:
        import yaml

        (self.folder / "flywheel.yaml").write_text(yaml.safe_dump(self.values))
        return self.folder / "flywheel.yaml"

    def hold(self, command: str) -> Path:
        """While this file is there, the stages of `command` wait."""
        gate = self.folder / f"hold-{command}"
        gate.touch()
        return gate

    @property
    def starts(self) -> list[str]:
        return starts(self.folder)

    def last_pid(self) -> int:
        return int((self.folder / "starts").read_text().split()[-1])

    def overview(self) -> dict[str, dict]:
        values = json.loads((self.out / "flywheel.json").read_text())
        return {stage["name"]: stage for stage in values["stages"]}

    def fingerprints(self) -> dict[str, str]:
        return {name: stage["fingerprint"] for name, stage in self.overview().items()}


if __name__ == "__main__":
    sys.exit(stand_in(sys.argv[2], sys.argv[3:]))
