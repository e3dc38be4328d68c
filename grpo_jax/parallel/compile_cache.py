"""The folder in which JAX stores compiled programs for the next run."""

import importlib
import os
import sys
from pathlib import Path


def use_compile_cache() -> None:
    """Let JAX store compiled programs in a folder that only this user can write to.

    Whoever can write to that folder can run code here, hence the mode. A cache that the
    user has chosen or turned off is left alone. Without a writable home there is no
    cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "grpo_jax" / "compiled" / _cache_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.parent.chmod(0o700)
    except OSError:
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def _cache_name() -> str:
    """The name of the folder with the programs that this Python can read.

    JAX compresses programs with the first module it finds, and the key of a program
    does not always name that module. A program compressed with zlib (3.13) cannot be
    read by a Python with zstd (3.14), which then warns and compiles again.
    """
    for compressor in ("compression.zstd", "zstandard"):  # in the order of JAX
        try:
            importlib.import_module(compressor)
            break
        except ImportError:
            continue
    else:
        compressor = "zlib"
    return f"python{sys.version_info.major}.{sys.version_info.minor}-{compressor}"
