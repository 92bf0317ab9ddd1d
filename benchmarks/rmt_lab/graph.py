"""The comparison as an ordered list of stages, in two parts.

    data -> pretrain = the base -> NTP -> SFT = the reference -> score the corpus and the held-out problems, with entropies
    base -> rmt, rpt, no-budget, no-curriculum, no-ntp;  rmt-slow, with more steps;  NTP and ReMiT with equal steps
    what rmt has cost -> NTP and ReMiT with equal compute

The last line's steps are known when rmt is done: `RmtSeed(..., compute)` then has all stages, the others first as before.
"""

from dataclasses import fields

from benchmarks.lab.graph import ARMS, CONTEXT, Arm, Seed
from benchmarks.lab.recipe import Recipe
from benchmarks.rmt_lab.compute import equal_steps
from benchmarks.rmt_lab.recipe import RECIPES, RmtRecipe, RmtSize
from pipelines.flywheel.stages import At, Stage, Word

REFERENCE = "rl"
RMT_ARMS: dict[str, tuple[str, ...]] = {
    "rmt": (),
    "rpt": ("--reward", "prefix", "--curriculum", "filter", "--budget", "off", "--ntp-weight", "0"),
    "no-budget": ("--budget", "off"),
    "no-curriculum": ("--curriculum", "off"),
    "no-ntp": ("--ntp-weight", "0"),
}
"""Options of remit rmt by arm, as docs/rmt.md lists them."""
SLOW = "rmt-slow"
"""rmt with more steps of reinforcement, over which the budget shrinks by as much: whether thoughts follow it, given time."""
EQUAL_STEPS = {"ntp-steps": ARMS["ntp"], "remit-steps": ARMS["remit"]}
EQUAL_COMPUTE = {"ntp": ARMS["ntp"], "remit": ARMS["remit"]}
WITHOUT_SCORES = ("ntp", "ntp-steps", "no-curriculum")
"""Arms that need nothing of the reference; the others' compute includes scoring the corpus once."""


class RmtSeed(Seed):
    """The stages of one seed. compute: of the rmt arm, of which `scored` for scoring the corpus; it says how long NTP and
    ReMiT train at equal compute. Without it their stages are left out."""

    recipe: RmtRecipe

    def __init__(self, size: RmtSize, seed: int, compute: int | None = None, scored: int = 0) -> None:
        self.compute, self.scored = compute, scored
        super().__init__(size, seed, RECIPES[size])

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.batch_rows * self.recipe.seq_len

    @property
    def steps(self) -> int:
        """Of every arm of remit rmt but rmt-slow."""
        return self.recipe.format_steps + self.recipe.policy_steps

    def _build(self) -> None:
        recipe = self.recipe
        words: tuple[Word, ...] = ("--size", self.size, "--seed", str(self.seed), "--out", At("out"))
        # what reinforcement mid-training adds to the recipe changes no data
        settings = {entry.name: getattr(recipe, entry.name) for entry in fields(Recipe)}
        self.data = self.add("data", "benchmarks.rmt_lab.data", words, {}, settings=settings)
        self.base = self.train(
            "pretrain", self.data, "start", "pretraining", ARMS["ntp"], recipe.pretraining_steps,
            recipe.pretraining_learning_rate,
        )  # fmt: skip
        self.models["base", "pretrained"] = self.base
        self.reference = self._reference()
        self.column(REFERENCE, self.reference)
        self._column_of_heldout()
        for name, options in RMT_ARMS.items():
            self._rmt(name, options, recipe.policy_steps)
        self._rmt(SLOW, (), recipe.slow_policy_steps)
        self._arms(EQUAL_STEPS, self.steps)
        if self.compute is not None:
            for name, arm in EQUAL_COMPUTE.items():
                scored = 0 if name in WITHOUT_SCORES else self.scored
                self._arms({name: arm}, equal_steps(self.compute - scored, self.tokens_per_step))
        for name in recipe.post_trained:
            if (name, "mid") in self.models:
                self.models[name, "sft"] = self._sft(f"{name}/sft", self.models[name, "mid"])
        self._measure()

    def _reference(self) -> Stage:
        recipe = self.recipe
        mid = self.train(
            "reference/mid", self.base, "", "midtraining", ARMS["ntp"], recipe.midtraining_steps,
            recipe.midtraining_learning_rate,
        )  # fmt: skip
        return self._sft("reference/sft", mid)

    def _sft(self, path: str, model: Stage) -> Stage:
        return self.post(path, "sft", model, ("--learning-rate", str(self.recipe.sft_learning_rate)))

    def column(self, name: str, model: Stage, on: str | None = None, stored: tuple[str, ...] = ()) -> Stage:
        """The corpus scored with a model: log-probs for ReMiT, entropies for the tiers."""
        self.columns[name] = self._score(f"score/{name}", model, "midtraining")
        return self.columns[name]

    def _column_of_heldout(self) -> None:
        self.heldout = self._score("score/heldout", self.reference, "heldout")

    def _score(self, path: str, model: Stage, rows: str) -> Stage:
        words: tuple[Word, ...] = (
            "score", "--shards", At("data", f"packed/{rows}"), "--model", At("model"), "--name", REFERENCE, "--out", At("out"),
            "--num-engines", "1", "--dtype", "float32", "--entropy", *CONTEXT,
        )  # fmt: skip
        return self.add(path, "pipelines.cli", words, {"model": model, "data": self.data}, resumes=True)

    def _rmt(self, name: str, options: tuple[str, ...], policy_steps: int) -> None:
        recipe = self.recipe
        words: tuple[Word, ...] = (
            "rmt", "--shards", At("shards"), "--model", At("start"), "--reference", REFERENCE, "--eval-shards", At("heldout"),
            "--out", At("out"), "--max-steps", str(policy_steps), "--format-steps", str(recipe.format_steps),
            "--positions-per-step", str(recipe.positions), "--num-generations", str(recipe.generations),
            "--first-budget", str(recipe.first_budget), "--budget-decay", str(recipe.budget_decay),
            "--learning-rate", str(recipe.policy_learning_rate), "--format-learning-rate", str(recipe.midtraining_learning_rate),
            "--max-answer", str(recipe.max_answer), "--eval-positions", str(recipe.eval_positions), "--micro-batch-size", "32",
            "--checkpoint-every", "20", "--keep-checkpoints", "1", "--seed", str(self.seed), "--dtype", "float32", *options,
        )  # fmt: skip
        inputs = {"shards": self.columns[REFERENCE], "start": self.base, "heldout": self.heldout}
        self.models[name, "mid"] = self.add(f"mid/{name}", "pipelines.cli", words, inputs, result="model", resumes=True)

    def _arms(self, arms: dict[str, Arm], steps: int) -> None:
        for name, arm in arms.items():
            shards = None if arm.reference is None else self.columns[REFERENCE]
            self.models[name, "mid"] = self.train(
                f"mid/{name}", self.base, "", "midtraining", arm, steps, self.recipe.midtraining_learning_rate, shards
            )

    def _measure(self) -> None:
        for (arm, kind), model in self.models.items():
            words: tuple[Word, ...] = (
                "--model", At("model"), "--data", At("data", "heldout"), "--shards", At("heldout"), "--out", At("out"),
                "--positions", str(self.recipe.eval_positions),
            )  # fmt: skip
            inputs = {"model": model, "data": self.data, "heldout": self.heldout}
            self.measured[arm, kind] = self.add(f"measure/{arm}/{kind}", "benchmarks.rmt_lab.measure", words, inputs)
