#!/usr/bin/env bash
# Makes the environments of the peers beside this file: trl/ and tunix/, each with the
# versions that were measured. Python 3.11; neither touches the project's own.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}

"$PYTHON" -m venv trl
trl/bin/pip install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 \
  accelerate==1.15.0 datasets==5.2.0 tokenizers==0.23.3 safetensors==0.8.0 numpy==2.4.6

"$PYTHON" -m venv tunix
tunix/bin/pip install --quiet google-tunix==0.1.7 jax==0.10.2 jaxlib==0.10.2 \
  flax==0.12.8 optax==0.2.8 qwix==0.1.8 orbax-checkpoint==0.12.8 \
  transformers==5.12.1 tokenizers==0.22.2 safetensors==0.7.0 numpy==2.4.6
