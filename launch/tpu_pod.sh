#!/bin/bash
# A Cloud TPU slice: makes it, installs on every worker, and trains until done.
#   NAME=skipinit ZONE=us-west4-a TYPE=v5litepod-64 REPOSITORY=https://... \
#     launch/tpu_pod.sh --config=configs/imagenet.py \
#     --config.data.dir=/mnt/data --workdir=/mnt/shared/runs/imagenet
# Needs the gcloud command, and a workdir that all workers see. The usual TPU
# image carries Python 3.10, too old for JAX: uv brings a newer one.
set -euo pipefail
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${REPOSITORY:?}"
IMAGE=${IMAGE:-v2-alpha-tpuv5-lite}

tpu() {
  gcloud compute tpus tpu-vm "$@" --zone="$ZONE"
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

make_slice() {
  case $(state) in
    ACTIVE) return ;;
    NONE) ;;
    *) # Preempted or failed: what is left of it must go first.
      gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" \
        --force --quiet ;;
  esac
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" \
    --zone="$ZONE" --accelerator-type="$TYPE" --runtime-version="$IMAGE" --spot
  until [ "$(state)" = ACTIVE ]; do sleep 60; done
}

install='set -e
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
export PATH=$HOME/.local/bin:$PATH
[ -d skipinit-jax ] || git clone -q '"$REPOSITORY"' skipinit-jax
cd skipinit-jax
[ -d .venv ] || uv venv -q --python 3.12
uv pip install -q -r requirements.txt "jax[tpu]"'

while true; do
  make_slice
  tpu ssh "$NAME" --worker=all --command="$install"
  status=0
  tpu ssh "$NAME" --worker=all --command="cd skipinit-jax &&
    .venv/bin/python train.py --distributed $(printf '%q ' "$@")" || status=$?
  case $status in
    0 | 1 | 2 | 3) exit $status ;; # Done, failed, bad input, diverged.
  esac
  echo "ended with status $status; going on" >&2
done
