"""The laboratory as an ordered list of stages: what is trained from what, and what is measured.

    data -> pretrain -> NTP -> SFT -> DPO -> RL = the reference -> score -> ReMiT -> SFT -> DPO -> RL -> score -> ReMiT²

All arms start from the same pre-trained model and take the same steps over the same rows; only what weights the tokens
differs. `Arm` says what an arm trains with.
"""

import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.lab.recipe import RECIPES, Recipe, Size
from pipelines.flywheel.stages import At, Stage, Word

NTP, REMIT = "ntp", "remit"
FULL_RL, SHORT_RL = "rl", "rl10"
SHORT_RL_SHARE = 0.1
CURVES = (NTP, REMIT, "ntp-guided")  # arms that are measured in mid-run too
CONTEXT = ("--context", "document")  # as the problems are posed later: nothing before them
SOFTENED = ("--entropy", "--entropy-temperature", "2")  # what a reverse KL at temperature 2 and the gate read


@dataclass(frozen=True)
class Arm:
    """options: of remit train; reference: the name of the column that it reads, none for NTP; selects: trains on the
    share of the rows that MiniPLM's selection keeps."""

    options: tuple[str, ...]
    reference: str | None = None
    selects: bool = False


ARMS: dict[str, Arm] = {
    NTP: Arm(("--objective", "ntp")),
    REMIT: Arm(("--objective", "remit"), "rl"),
    "ntp-guided": Arm(("--objective", "remit"), "ntp"),
    "sft-guided": Arm(("--objective", "remit"), "sft"),
    "rho1": Arm(("--objective", "rho1", "--keep-ratio", "0.8"), "curated"),
    "miniplm": Arm(("--objective", "ntp"), selects=True),
    "kd": Arm(("--objective", "kd"), "rl"),
    "no-clip": Arm(("--objective", "remit", "--epsilon", "inf"), "rl"),
    "remit-rl10": Arm(("--objective", "remit"), "rl10"),
    "remit2": Arm(("--objective", "remit"), "rl2"),
    "rkl": Arm(("--objective", "rkl", "--temperature", "2"), "rl"),
    "switch": Arm(("--objective", "switch"), "sure"),
}
"""`rl` is the reference made from the NTP arm, `rl10` the same after a tenth of the steps, `rl2` made from the ReMiT arm; `sure`
is `rl` again, with its most probable tokens stored only where its entropy is low."""


class Seed:
    """The stages of one seed, in an order in which each stands after what it reads."""

    recipe: Recipe

    def __init__(self, size: Size, seed: int, recipe: Recipe | None = None) -> None:
        self.size, self.seed, self.recipe = size, seed, RECIPES[size] if recipe is None else recipe
        self.stages: list[Stage] = []
        self.models: dict[tuple[str, str], Stage] = {}
        """Models that are measured, by arm and by what was done last (pretrained, mid, sft, dpo, rl)."""
        self.measured: dict[tuple[str, str], Stage] = {}
        self.curves: dict[str, Stage] = {}
        """Measurements of the models that an arm's mid-training wrote on its way."""
        self.columns: dict[str, Stage] = {}
        self._build()

    def name(self, path: str) -> str:
        return f"seed-{self.seed}/{path}"

    def add(
        self, path: str, module: str, words: tuple[Word, ...], inputs: Mapping[str, Stage], result: str = "",
        resumes: bool = False, settings: Mapping[str, Any] | None = None,
    ) -> Stage:  # fmt: skip
        stage = Stage(
            self.name(path), (module, *words), inputs, launcher=(sys.executable, "-m"), seed=self.seed, settings=settings or {},
            result=result, resumes=resumes,
        )  # fmt: skip
        self.stages.append(stage)
        return stage

    def _build(self) -> None:
        recipe, arms = self.recipe, self.recipe.arms
        words: tuple[Word, ...] = ("--size", self.size, "--seed", str(self.seed), "--out", At("out"))
        self.data = self.add("data", "benchmarks.lab.data", words, {}, settings=asdict(recipe))
        self.base = self.train(
            "pretrain", self.data, "start", "pretraining", ARMS[NTP], recipe.pretraining_steps,
            recipe.pretraining_learning_rate,
        )  # fmt: skip
        self.models["base", "pretrained"] = self.base
        ntp = self.arm(NTP)
        sft, _, rl = self.post_train(NTP)
        if REMIT in arms:
            # one scoring for ReMiT and for distillation: the log-probs are the same with and without the other columns
            self.column("rl", rl, stored=self.stored_for(arms))
            self.arm(REMIT)
            self.measure_all(rl)  # so that the first numbers do not wait for all arms
        if "remit2" in arms or REMIT in recipe.post_trained:
            remit_rl = self.post_train(REMIT)[-1]
        if "remit2" in arms:
            self.column("rl2", remit_rl)
            self.arm("remit2")
        self.measure_all(rl)
        others = [arm for arm in ARMS if arm in arms and (arm, "mid") not in self.models]
        for arm in others:
            self.prepare(arm, ntp, sft, rl)
            self.arm(arm)
            self.measure_all(rl)
        for arm in recipe.post_trained:
            if (arm, "rl") not in self.models:
                self.post_train(arm)
        self.measure_all(rl)

    def stored_for(self, arms: Collection[str]) -> tuple[str, ...]:
        """Options of remit score for the columns that arms read beside log-probs."""
        top = ("--top-k", str(self.recipe.top_k)) if {"kd", "rkl", "switch"} & set(arms) else ()
        return (*top, *(SOFTENED if {"rkl", "switch"} & set(arms) else ()))

    def prepare(self, arm: str, ntp: Stage, sft: Stage, rl: Stage) -> None:
        """What an arm reads that is not there yet: its reference, and the corpus scored with it."""
        recipe = self.recipe
        if arm == "ntp-guided":
            self.column("ntp", ntp)
        elif arm == "sft-guided":
            self.column("sft", sft)
        elif arm == "miniplm":
            self.column("base", self.base, on="rl")
        elif arm == "rho1":
            curated = self.train(
                "curated", self.base, "", "curated", ARMS[NTP], recipe.curated_steps, recipe.midtraining_learning_rate
            )
            self.column("curated", curated)
        elif arm == "remit-rl10":
            short = self.rl("ntp/rl10", self.models[NTP, "dpo"], max(1, round(recipe.rl_steps * SHORT_RL_SHARE)))
            self.models["ntp-rl10", "rl"] = short
            self.column("rl10", short)
        elif arm == "switch":
            self.column("sure", rl, stored=(*self.stored_for([arm]), "--top-k-below-entropy", "quantile:0.2"))

    def train(
        self, path: str, start: Stage, sub: str, rows: str, arm: Arm, steps: int, learning_rate: float,
        shards: Stage | None = None, evaluations: int = 0, exports: int = 0,
    ) -> Stage:  # fmt: skip
        """A run of remit train. start/sub: model; rows: packed corpus, unless `shards` are given."""
        recipe = self.recipe
        inputs: dict[str, Stage] = {"start": start, "data": self.data}
        folder: Word = At("data", f"packed/{rows}")
        if shards is not None:
            inputs["shards"], folder = shards, At("shards")
        words: tuple[Word, ...] = (
            "train", *arm.options, *(("--reference", arm.reference) if arm.reference else ()), "--shards", folder,
            "--model", At("start", sub), "--out", At("out"), "--max-steps", str(steps),
            "--global-batch-size", str(recipe.batch_rows), "--micro-batch-size", str(recipe.batch_rows),
            "--learning-rate", str(learning_rate), "--warmup-steps", str(min(20, steps // 10)),
            "--seed", str(self.seed), "--dtype", "float32", *CONTEXT, "--keep-checkpoints", "1",
            "--checkpoint-every", str(max(1, steps // 4)),
        )  # fmt: skip
        if evaluations:
            words += ("--eval-shards", At("data", "packed/heldout"), "--eval-every", str(max(1, steps // evaluations)))
        if exports:
            words += ("--export-every", str(steps // exports))
        return self.add(path, "pipelines.cli", words, inputs, result="model", resumes=True)

    def arm(self, name: str) -> Stage:
        """The mid-training of an arm."""
        arm, shards = ARMS[name], None
        if arm.selects:
            shards = self.add(
                "select/miniplm", "pipelines.cli",
                ("select", "--shards", At("scored"), "--teacher", "rl", "--small", "base", "--out", At("out")),
                {"scored": self.columns["base"]}, resumes=True,
            )  # fmt: skip
        elif arm.reference is not None:
            shards = self.columns[arm.reference]
        stage = self.train(
            f"mid/{name}", self.base, "", "midtraining", arm, self.recipe.midtraining_steps,
            self.recipe.midtraining_learning_rate, shards, self.recipe.evaluations, self.recipe.exports if name in CURVES else 0,
        )  # fmt: skip
        self.models[name, "mid"] = stage
        return stage

    def column(self, name: str, model: Stage, on: str | None = None, stored: tuple[str, ...] = ()) -> Stage:
        """The mid-training corpus scored with a model. on: another column that the folder has too; stored: options for more
        columns."""
        inputs: dict[str, Stage] = {"model": model}
        if on is None:
            inputs["data"] = self.data
            folder = At("data", "packed/midtraining")
        else:
            inputs["scored"] = self.columns[on]
            folder = At("scored")
        words: tuple[Word, ...] = (
            "score", "--shards", folder, "--model", At("model"), "--name", name, "--out", At("out"),
            "--num-engines", "1", "--dtype", "float32", *CONTEXT, *stored,
        )  # fmt: skip
        self.columns[name] = self.add(f"score/{name}", "pipelines.cli", words, inputs, resumes=True)
        return self.columns[name]

    def post_train(self, arm: str) -> tuple[Stage, Stage, Stage]:
        """SFT, DPO and RL of an arm."""
        recipe = self.recipe
        model = self.models[arm, "mid"]
        sft = self.post(f"{arm}/sft", "sft", model, ("--learning-rate", str(recipe.sft_learning_rate)))
        dpo = self.post(f"{arm}/dpo", "dpo", sft, ("--learning-rate", str(recipe.dpo_learning_rate)))
        rl = self.rl(f"{arm}/rl", dpo, recipe.rl_steps)
        self.models |= {(arm, "sft"): sft, (arm, "dpo"): dpo, (arm, "rl"): rl}
        return sft, dpo, rl

    def rl(self, path: str, model: Stage, steps: int) -> Stage:
        recipe = self.recipe
        return self.post(
            path, "rl", model,
            ("--max-steps", str(steps), "--batch-size", str(recipe.rl_batch), "--learning-rate",
             str(recipe.rl_learning_rate), "--num-generations", str(recipe.rl_generations), "--max-completion-length",
             "56", "--schedule", "linear", "--warmup-steps", str(steps // 15)),
        )  # fmt: skip

    def post(self, path: str, kind: str, model: Stage, options: tuple[str, ...]) -> Stage:
        words: tuple[Word, ...] = (
            kind, "--model", At("model"), "--data", At("data", f"posttrain/{kind}.jsonl"),
            "--out", At("out"), "--seed", str(self.seed), "--dtype", "float32", *options,
        )  # fmt: skip
        inputs: dict[str, Stage] = {"model": model, "data": self.data}
        return self.add(f"post/{path}", "pipelines.cli", words, inputs, result="model", resumes=True)

    def measure_all(self, reference: Stage) -> None:
        """Measure every model that is in the graph by now."""
        recipe = self.recipe
        for (arm, what), model in self.models.items():
            if (arm, what) in self.measured:
                continue
            words: tuple[Word, ...] = (
                "--model", At("model"), "--reference", At("reference"),
                "--data", At("data", "heldout"), "--out", At("out"), "--sampled", str(recipe.sampled),
                "--seed", str(self.seed),
            )  # fmt: skip
            inputs: dict[str, Stage] = {"model": model, "reference": reference, "data": self.data}
            self.measured[arm, what] = self.add(f"measure/{arm}/{what}", "benchmarks.lab.measure", words, inputs)
        for arm in CURVES if recipe.exports else ():
            if (arm, "mid") in self.models and arm not in self.curves:
                words = (
                    "--start", At("start"), "--exports", At("model", "../exports"), "--model", At("model"),
                    "--steps", str(recipe.midtraining_steps), "--data", At("data", "heldout"), "--out", At("out"),
                    "--problems", str(recipe.curve_problems), "--sampled", "0",
                )  # fmt: skip
                inputs = {"start": self.base, "model": self.models[arm, "mid"], "data": self.data}
                # the exports lie beside the model that the stage's result is: which ones there are has to be in the key
                settings = {"exports": recipe.exports}
                self.curves[arm] = self.add(f"curve/{arm}", "benchmarks.lab.measure", words, inputs, settings=settings)
