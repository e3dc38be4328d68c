#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 with tensorstore 0.1.86 (jax 0.10.2). Linux, with a C compiler.
#
# Expected: where a disk or a mounted bucket fails for a moment, reading a checkpoint
# raises an OSError with the error number EIO, so that a program can tell a storage that
# fails from a file that is damaged. TensorStore reads the arrays, and makes it a
# ValueError whose text ends in the number; Orbax wraps that once more. `except OSError`
# never sees it, and a text must be read: "[os_error_code='5']".
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
python=$place/venv/bin/python
"$python" -m pip install --quiet jax==0.10.2 jaxlib==0.10.2 \
  orbax-checkpoint==0.12.8 tensorstore==0.1.86
cat >"$place/failing.c" <<'END'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* As a storage that is away: every pread of an array of the checkpoint fails. */
static ssize_t read_at(const char *name, int fd, void *to, size_t size, long at) {
  ssize_t (*real)(int, void *, size_t, long) = dlsym(RTLD_NEXT, name);
  char link[64], path[4096] = "";
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length > 0 && strstr(path, "/checkpoint/") && strstr(path, "/d/")) {
    errno = EIO;
    return -1;
  }
  return real(fd, to, size, at);
}
ssize_t pread(int fd, void *to, size_t size, off_t at) {
  return read_at("pread", fd, to, size, at);
}
ssize_t pread64(int fd, void *to, size_t size, off64_t at) {
  return read_at("pread64", fd, to, size, at);
}
END
cc -shared -fPIC -o "$place/failing.so" "$place/failing.c" -ldl
cat >"$place/program.py" <<'END'
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp

path, action = sys.argv[1:]
checkpointer = ocp.PyTreeCheckpointer()
if action == "save":
    checkpointer.save(path, {"w": jnp.ones((64, 64))})
else:
    try:
        print("restored", checkpointer.restore(path)["w"].shape)
    except Exception as error:
        chain = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        print("OSError among them:", any(isinstance(one, OSError) for one in chain))
        print(type(chain[-1]).__name__, str(chain[-1])[-19:])
END
export JAX_PLATFORMS=cpu
"$python" "$place/program.py" "$place/checkpoint" save 2>/dev/null
"$python" "$place/program.py" "$place/checkpoint" restore 2>/dev/null | tee "$place/seen"
LD_PRELOAD=$place/failing.so "$python" "$place/program.py" "$place/checkpoint" restore \
  2>/dev/null | tee -a "$place/seen"
diff "$place/seen" - <<'END'
restored (64, 64)
OSError among them: False
ValueError [os_error_code='5']
END
echo "as described"
