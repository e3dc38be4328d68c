"""Objects in a bucket of Cloud Storage. Only this module knows gcsfs.

TensorStore writes the arrays of checkpoints there by itself. Both take the credentials
of the machine.
"""

import contextlib
import datetime
import email.utils
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_AT_ONCE = 64  # objects


class Objects:
    """The objects under an address such as ``gs://bucket/runs/first``.

    Names are relative to it. Every method raises OSError where the storage fails, and
    FileNotFoundError where an object is missing.
    """

    def __init__(self, address: str) -> None:
        """Opens an address; nothing is read yet.

        Raises:
          ValueError: if gcsfs is not installed.
        """
        try:
            gcsfs = importlib.import_module("gcsfs")
        except ImportError as error:
            raise ValueError(
                f"{address} needs gcsfs, which is not installed; run pip install "
                "'grpo-jax[gcs]', or give a local folder."
            ) from error
        self.address = address
        self._root = address.removeprefix("gs://").rstrip("/")
        self._bucket, _, self._key = self._root.partition("/")
        # Other machines, and TensorStore, write there as well. A listing that is kept
        # would hide what they have written, and Orbax would take a folder that was
        # removed to be there. This holds for the file system that Orbax makes, too.
        settings = importlib.import_module("fsspec.config").conf
        settings.setdefault("gcs", {})["use_listings_cache"] = False
        self._files = gcsfs.GCSFileSystem()

    def read(self, name: str) -> bytes:
        """The content of an object."""
        with self._errors():
            return self._files.cat_file(f"{self._root}/{name}")

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Names and contents of objects, of which some are read at a time."""
        for start in range(0, len(names), _AT_ONCE):
            few = names[start : start + _AT_ONCE]
            paths = [f"{self._root}/{name}" for name in few]
            with self._errors():
                found = self._files.cat(paths)
            yield from zip(few, map(found.__getitem__, paths), strict=True)

    def write(self, name: str, content: bytes, *, new: bool = False) -> None:
        """Writes an object; with `new` it raises FileExistsError if it is there."""
        mode = "create" if new else "overwrite"
        with self._errors():
            self._files.pipe_file(f"{self._root}/{name}", content, mode=mode)

    def upload(self, file: Path, name: str) -> None:
        """Writes an object with the content of a file."""
        with self._errors():
            self._files.put_file(str(file), f"{self._root}/{name}")

    def has(self, name: str) -> bool:
        """Whether there is an object, or one in a folder, of this name."""
        # `exists` of fsspec answers no when the storage fails for a moment.
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._files.info(f"{self._root}/{name}")
            return True
        return False

    def files(self, folder: str = "") -> list[str]:
        """The names of the objects that lie directly in a folder."""
        return [name for name, kind in self._listed(folder) if kind == "file"]

    def folders(self, folder: str = "") -> list[str]:
        """The names of the folders that lie directly in a folder."""
        return [name for name, kind in self._listed(folder) if kind == "directory"]

    def remove(self, name: str) -> None:
        """Removes an object, or all in a folder; nothing happens if it is missing."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._files.rm(f"{self._root}/{name}", recursive=True)

    def move(self, folder: str, to: str) -> None:
        """Moves the objects of a folder one by one. It is not atomic."""
        with self._errors():
            for path in self._files.find(f"{self._root}/{folder}"):
                inner = path.removeprefix(f"{self._root}/{folder}/")
                self._files.mv(path, f"{self._root}/{to}/{inner}")

    def state(self, name: str) -> tuple[str, str, float]:
        """Generation, metageneration, and seconds since its last change.

        The latter by the clock of the storage.
        """
        with self._errors():
            headers, body = self._call("GET", name)
        found = json.loads(body)
        now = email.utils.parsedate_to_datetime(headers["Date"])
        changed = datetime.datetime.fromisoformat(found["updated"])
        age = (now - changed).total_seconds()
        return found["generation"], found["metageneration"], age

    def touch(self, name: str, generation: str) -> None:
        """Renews the age of an object.

        Raises:
          FileExistsError: if it has another generation: someone has replaced it.
        """
        with self._errors():
            now = {"metadata": {"renewed": datetime.datetime.now().isoformat()}}
            self._call("PATCH", name, json=now, generation=generation)

    def remove_generation(self, name: str, generation: str) -> None:
        """Removes an object; raises as `touch`."""
        with self._errors():
            self._call("DELETE", name, generation=generation)

    def _call(
        self, method: str, name: str, *, generation: str | None = None, **more: Any
    ) -> Any:
        key = f"{self._key}/{name}" if self._key else name
        if generation is not None:
            more["ifGenerationMatch"] = generation
        return self._files.call(method, "b/{}/o/{}", self._bucket, key, **more)

    def _listed(self, folder: str) -> Iterator[tuple[str, str]]:
        path = f"{self._root}/{folder}".rstrip("/")
        with self._errors(), contextlib.suppress(FileNotFoundError):
            for entry in self._files.ls(path, detail=True):
                if entry["name"].rstrip("/") != path:  # a mark of the folder itself
                    yield entry["name"].rstrip("/").rpartition("/")[2], entry["type"]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            raise
        # gcsfs, aiohttp and google.auth each have types of their own.
        except Exception as error:
            text = str(error) or type(error).__name__
            raise OSError(f"{self.address}: {text}") from error
