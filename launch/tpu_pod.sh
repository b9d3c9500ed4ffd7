#!/bin/bash
# Creates a Cloud TPU slice, trains on all of its hosts until the run is done, and
# deletes the slice. docs/pod.md goes through every step.
#   NAME=skipinit ZONE=us-west4-a TYPE=v5litepod-64 REPOSITORY=https://... \
#     launch/tpu_pod.sh --config=configs/imagenet.py \
#     --config.data.dir=/mnt/data --workdir=gs://BUCKET/runs/imagenet
# Needs gcloud and git here, and a workdir that all hosts see. Also read:
#   FLAGS         of `gcloud compute tpus queued-resources create` (--spot)
#   SETUP         commands for every host before training, such as mounting data
#   REVISION      what to train (the commit that REPOSITORY's HEAD is at now)
#   IMAGE         of the hosts (v2-alpha-tpuv5-lite)
#   KEEP          1: leaves the slice, which is billed on
#   MAX_RESTARTS  (100)
#   POLL_SECONDS  how often to ask for the slice's state (60)
# If the slice is preempted or the run is lost or stuck, it starts again, after a
# wait that grows from 10 s to 11 min. If only ssh is lost, the run goes on, and is
# followed again.
set -euo pipefail

refuse() {
  echo "error: $1" >&2
  exit 2
}

: "${NAME:=}" "${ZONE:=}" "${TYPE:=}" "${REPOSITORY:=}"
[[ -n $NAME ]] || refuse 'NAME is not set: the name of the slice'
[[ -n $ZONE ]] || refuse 'ZONE is not set: where the quota is, as in us-west4-a'
[[ -n $TYPE ]] || refuse 'TYPE is not set: what to create, as in v5litepod-64'
[[ -n $REPOSITORY ]] || refuse 'REPOSITORY is not set: what the hosts clone'
IMAGE=${IMAGE:-v2-alpha-tpuv5-lite}
MAX_RESTARTS=${MAX_RESTARTS:-100}
POLL_SECONDS=${POLL_SECONDS:-60}
read -ra flags <<<"${FLAGS---spot}"
command -v gcloud >/dev/null ||
  refuse 'gcloud is not here: https://cloud.google.com/sdk/docs/install'
export CLOUDSDK_CORE_DISABLE_PROMPTS=1

ours=false     # There may be a slice that is ours to delete.
made=false     # It was ACTIVE once, so that the quota is enough for it.
follower=      # The process that shows the run, while there is one.
cleaning=false # The script ends, whatever fails.
exec 3>&2
errors=$(mktemp)
output=$(mktemp)

resource() {
  local action=$1
  shift
  gcloud compute tpus queued-resources "$action" "$NAME" --zone="$ZONE" "$@"
}
delete="gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force"

# A host that is gone answers nothing: ssh notices after three silent intervals.
ssh=(
  gcloud compute tpus tpu-vm ssh "$NAME" "--zone=$ZONE" --worker=all
  --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oConnectTimeout=60
)

# A signal ends `wait`, but not a sleep.
pause() {
  sleep "$1" >/dev/null 2>&1 3>&- &
  wait $!
}

# What gcloud said when it failed. Exits if trying again would not help.
failed() {
  local said
  said=$(grep -m1 ERROR "$errors" || head -n1 "$errors")
  said=${said#ERROR: } said=${said%.}
  if ! $cleaning; then
    case $(<"$errors") in
      *'gcloud auth login'* | *UNAUTHENTICATED*)
        refuse "$said; run gcloud auth login"
        ;;
      *PERMISSION_DENIED*)
        refuse "$said; has the project the TPU API, and you the role TPU Admin? \
gcloud services enable tpu.googleapis.com"
        ;;
      *'[project]'*)
        refuse "$said; choose a project: gcloud config set project PROJECT"
        ;;
      *'unrecognized arguments'* | *'invalid choice'* | *': argument --'* | */disks/*)
        refuse "$said; look at FLAGS=${flags[*]-}"
        ;;
      *ALREADY_EXISTS*)
        refuse "$said; $NAME was not made by this script: choose another NAME"
        ;;
      *INVALID_ARGUMENT*)
        refuse "$said; do TYPE=$TYPE, ZONE=$ZONE, IMAGE=$IMAGE and FLAGS go \
together? gcloud compute tpus accelerator-types list --zone=$ZONE"
        ;;
      *[Qq]uota*)
        $made || refuse "$said; requests that are left over count too: gcloud \
compute tpus queued-resources list --zone=$ZONE; spot and on-demand quotas differ \
(FLAGS); ask for more: https://cloud.google.com/tpu/docs/quota"
        ;;
    esac
  fi
  echo "$said" >&2
  return 1
}

# Sets `state`, to NONE if there is no such resource, and `why` if it has FAILED.
look() {
  local found
  if found=$(resource describe \
    --format='value(state.state,state.failedData.error.message)' 2>"$errors"); then
    IFS=$'\t' read -r state why <<<"$found"
    ours=true
  elif [[ $(<"$errors") == *NOT_FOUND* ]]; then
    state=NONE
  else
    failed
  fi
}

make_slice() {
  local before='' asked=false
  while look; do
    [[ $state == "$before" ]] || echo "$NAME: $state" >&2
    before=$state
    case $state in
      ACTIVE)
        made=true
        return 0
        ;;
      NONE)
        asked=true
        ours=true
        resource create --node-id="$NAME" --accelerator-type="$TYPE" \
          --runtime-version="$IMAGE" ${flags[@]+"${flags[@]}"} \
          2>"$errors" || failed || return 1
        ;;
      FAILED | SUSPENDED) # It would stay in the queue, and count in the quota.
        if [[ $state == FAILED ]]; then
          echo "${why:-no reason given}" >"$errors"
          failed || true
        fi
        resource delete --force 2>"$errors" || failed || return 1
        ! $asked || return 1
        ;;
      *) # Being made, or being deleted.
        pause "$POLL_SECONDS"
        ;;
    esac
  done
  return 1
}

remove_slice() {
  local tries
  for tries in 1 2 3 4 5; do
    if look; then
      [[ $state != NONE ]] || return 0
      if [[ $state != DELETING ]]; then
        resource delete --force 2>"$errors" && return 0
        failed
      fi
    fi
    ((tries == 5)) || pause "$POLL_SECONDS"
  done
  return 1
}

# What the hosts do. Their runs do not depend on ssh, and are known by a lock that
# each holds for as long as it lives; a file with its number would outlive a reboot.
# Where a connection breaks, gcloud itself connects again and repeats the command.
run() {
  .venv/bin/python train.py --distributed "$@"
  # gcloud returns one status for all hosts, so each prints its own.
  echo "train.py ended with status $?"
}

follow() {
  local command="$*" lines=10
  touch train.log
  exec 9>>train.lock
  if flock -n 9; then
    echo "$command" >train.command
    lines=+$(($(wc -l <train.log) + 1))
    cd skipinit-jax
    setsid bash -c "$(declare -f run)"'; run "$@"' bash "$@" \
      >>../train.log 2>&1 </dev/null &
    cd ..
    echo $! >train.pid
  elif [[ $(<train.command) != "$command" ]]; then
    echo 'train.py ended with status 73'
    exit 73
  fi
  exec 9>&-
  tail -n "$lines" -f -s 0.2 --pid="$(<train.pid)" train.log
}

stop() {
  flock -n train.lock true && return
  pkill -TERM -P "$(<train.pid)"
  timeout 240 tail -f -s 0.2 --pid="$(<train.pid)" /dev/null
}

prepare() {
  set -e
  # The files of a run that goes on are left alone.
  flock -n train.lock true || exit 0
  # The usual image carries Python 3.10, too old for JAX: Ubuntu's own 3.11 goes
  # beside it.
  if ! python3.11 -c 'import ensurepip'; then
    sudo apt-get update -q
    sudo apt-get install -q -y python3.11-venv
  fi
  [[ -d skipinit-jax ]] || git clone -q -- "$1" skipinit-jax
  cd skipinit-jax
  git fetch -q
  git checkout -q --detach "$2"
  [[ -x .venv/bin/pip ]] || python3.11 -m venv .venv
  .venv/bin/pip install -q -r requirements.txt 'jax[tpu]' gcsfs
  cd ..
}

# Has all hosts call a function with arguments, and then run a line of shell.
on_hosts() {
  local call=$1 line=$2 quoted=
  shift 2
  (($# == 0)) || printf -v quoted ' %q' "$@"
  "${ssh[@]}" --command="$(declare -f run follow stop prepare)
$call$quoted
$line"
}

clean_up() {
  local status=$?
  set +e
  exec 2>&3 # A signal may have come to a command whose errors go elsewhere.
  trap - EXIT
  trap '' INT TERM HUP
  cleaning=true
  if [[ -n $follower ]]; then
    echo 'stopping the run, which saves first' >&2
    on_hosts stop ''
  fi
  if [[ $ours == true && ${KEEP:-} == 1 ]]; then
    echo "$NAME is kept, and billed until you run: $delete" >&2
  elif $ours; then
    echo "deleting $NAME" >&2
    remove_slice ||
      echo "error: $NAME is NOT deleted, and billed until you run: $delete" >&2
  fi
  [[ -z $follower ]] || pkill -P "$follower"
  rm -f "$errors" "$output"
  exit "$status"
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# The same commit on every slice, and no slice for a repository that isn't there.
if [[ -z ${REVISION:-} ]]; then
  head=$(git ls-remote -- "$REPOSITORY" HEAD 2>"$errors") ||
    refuse "git can't read REPOSITORY=$REPOSITORY: $(head -n1 "$errors")"
  REVISION=${head%%[[:space:]]*}
fi

# Connections fail while hosts start, but the slice is billed meanwhile.
failures=0
prepare_hosts() {
  if on_hosts prepare "${SETUP:-}" "$REPOSITORY" "$REVISION"; then
    failures=0
    return 0
  fi
  failures=$((failures + 1))
  if ((failures == 5)); then
    echo "installing or SETUP failed on the hosts $failures times in a row; \
starting again would not help" >&2
    exit 1
  fi
  return 1
}

# Returns 0 when the run is done; exits if a restart can't fix it.
attempt() {
  local well=true heard=false status
  make_slice || return 1
  prepare_hosts || return 1
  # In the background, since a signal ends `wait` at once.
  (on_hosts follow '' "$@" | tee "$output") &
  follower=$!
  wait "$follower" || well=false
  follower=
  while read -r status; do
    heard=true
    case $status in
      0) ;;
      75 | 76 | 129 | 134 | 137 | 138 | 143) well=false ;;
      73)
        KEEP=1
        refuse "$NAME trains something else, which is left alone: choose another \
NAME, or end it: $delete"
        ;;
      *) # Failed, bad input, diverged.
        echo "the run ended with status $status; starting again would not help" >&2
        exit "$status"
        ;;
    esac
  done < <(sed -n 's/.*train.py ended with status \([0-9]*\)$/\1/p' "$output")
  $heard && $well
}

for ((restarts = 0; ; restarts++)); do
  if attempt "$@"; then
    exit 0
  fi
  if ((restarts >= MAX_RESTARTS)); then
    echo "$restarts restarts; giving up" >&2
    exit 75
  fi
  seconds=$((10 << (restarts < 6 ? restarts : 6)))
  echo "restart $((restarts + 1)) in $seconds s" >&2
  pause "$seconds"
done
