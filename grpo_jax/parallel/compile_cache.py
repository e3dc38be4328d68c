"""Where programs that JAX compiled are kept for the next run."""

import importlib
import os
import sys
from pathlib import Path


def use_compile_cache() -> None:
    """Let JAX keep compiled programs, in a folder of this user alone.

    Who can write to that folder can run code here, hence the mode. A cache that the
    user has chosen, or turned off, stays as it is. Without a home that can be written
    there is no cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "grpo_jax" / "compiled" / cache_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.parent.chmod(0o700)
    except OSError:
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def cache_name() -> str:
    """The name of the folder whose programs this Python can read.

    JAX compresses programs with what it finds, and finds a program again by a key that
    does not always say with what: one that was compressed by zlib (3.13) cannot be
    read by a Python with zstd (3.14), which then warns and compiles.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"python{python}-{_compressor()}"


def _compressor() -> str:
    for module in ("compression.zstd", "zstandard"):  # in the order of JAX
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        return module
    return "zlib"
