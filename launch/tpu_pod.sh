#!/bin/bash
# Creates a Cloud TPU slice, installs on every worker, and trains until done.
#   NAME=skipinit ZONE=us-west4-a TYPE=v5litepod-64 REPOSITORY=https://... \
#     launch/tpu_pod.sh --config=configs/imagenet.py \
#     --config.data.dir=/mnt/data --workdir=/mnt/shared/runs/imagenet
# Needs the gcloud command, and a workdir that all workers see. The usual TPU
# image carries Python 3.10, too old for JAX: Ubuntu's own 3.11 is installed.
# If the slice is lost or preempted, or the run is stuck, it starts again, at most
# MAX_RESTARTS times, after a wait that grows from 10 s to 11 min.
set -euo pipefail
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${REPOSITORY:?}"
IMAGE=${IMAGE:-v2-alpha-tpuv5-lite}
MAX_RESTARTS=${MAX_RESTARTS:-100}
output=$(mktemp)
trap 'rm -f "$output"' EXIT

resource() {
  local action=$1
  shift
  gcloud compute tpus queued-resources "$action" "$NAME" --zone="$ZONE" "$@"
}

on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="$1"
}

# Sets `state`, to NONE if there is no such resource. Returns 1 if gcloud fails for
# another reason; exits if a retry would not help.
look() {
  if state=$(resource describe --format='value(state.state)' 2>"$output"); then
    return 0
  fi
  case $(<"$output") in
    *NOT_FOUND*) state=NONE ;;
    *PERMISSION_DENIED* | *UNAUTHENTICATED* | *INVALID_ARGUMENT*)
      cat "$output" >&2
      exit 2
      ;;
    *)
      cat "$output" >&2
      return 1
      ;;
  esac
}

make_slice() {
  look || return 1
  case $state in
    NONE | ACTIVE | ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES)
      ;;
    *) # Preempted or failed: delete what is left of it first.
      resource delete --force --quiet || return 1
      state=NONE
      ;;
  esac
  if [[ $state == NONE ]]; then
    resource create --node-id="$NAME" --accelerator-type="$TYPE" \
      --runtime-version="$IMAGE" --spot || return 1
    look || return 1
  fi
  while true; do
    case $state in
      ACTIVE) return 0 ;;
      ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) sleep 60 ;;
      *)
        echo "the slice is $state" >&2
        return 1
        ;;
    esac
    look || return 1
  done
}

printf -v repository '%q' "$REPOSITORY"
install="set -e
command -v python3.11 >/dev/null && python3.11 -c 'import ensurepip' ||
  { sudo apt-get update -q && sudo apt-get install -q -y python3.11-venv; }
[ -d skipinit-jax ] || git clone -q -- $repository skipinit-jax
cd skipinit-jax
[ -d .venv ] || python3.11 -m venv .venv
.venv/bin/pip install -q -r requirements.txt 'jax[tpu]'"

arguments=
(($# == 0)) || printf -v arguments ' %q' "$@"
# gcloud does not return the workers' exit statuses, so they print them.
ended='train.py ended with status'
train="cd skipinit-jax
.venv/bin/python train.py --distributed$arguments
status=\$?
echo \"$ended \$status\"
exit \$status"

# Returns 0 when the run is done; exits if a restart can't fix it.
attempt() {
  local ended_well=true heard=false status
  make_slice || return 1
  on_all_workers "$install" || return 1
  on_all_workers "$train" | tee "$output" || ended_well=false
  while read -r status; do
    heard=true
    case $status in
      0) ;;
      75 | 76 | 129 | 134 | 137 | 138 | 143) ended_well=false ;;
      *) exit "$status" ;; # Failed, bad input, diverged.
    esac
  done < <(sed -n "s/.*$ended \([0-9]*\)\$/\1/p" "$output")
  $heard && $ended_well
}

for ((restarts = 0; ; restarts++)); do
  if attempt; then
    exit 0
  fi
  if ((restarts >= MAX_RESTARTS)); then
    echo "$restarts restarts; giving up" >&2
    exit 75
  fi
  pause=$((10 << (restarts < 6 ? restarts : 6)))
  echo "restart $((restarts + 1)) in $pause s" >&2
  sleep "$pause"
done
