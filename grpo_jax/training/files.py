"""Files that a reader sees whole: the old one or the new one, never a part."""

import json
import os
from pathlib import Path
from typing import Any

from grpo_jax.reporting.metrics import plain


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write strict JSON, for people to read as well."""
    write_atomically(file, json.dumps(plain(values), indent=2, allow_nan=False) + "\n")


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
