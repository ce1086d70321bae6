#!/usr/bin/env bash
# A run of fac on all hosts of a TPU VM slice, from a machine that has gcloud (a screen or tmux there keeps it alive):
#   gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5litepod-256 --version=v2-alpha-tpuv5-lite
#   bash launch/tpu_vm/run.sh NAME ZONE train configs/mine.yaml --run.dir /mnt/runs/wide
# Copies this project to every host, installs it there (both are quick when nothing has changed) and runs the command on
# all of them; JAX finds its place by what Google tells each host. The store and the run must lie where all hosts see
# them, on Filestore for instance.
#
# When the process of one host fails, the others have FAC_NOTICE_S (20 seconds) to see it, then SIGTERM and, after
# FAC_GRACE_S (180 seconds), SIGKILL; then all of them start again, FAC_RESTARTS times at most (3). Status 1, 2 and 130
# (a person must mend something, wrong usage, Ctrl-C) end the run. SIGTERM or Ctrl-C here lets every process save, and
# ends the run. The last line says why it ended. If this script itself is killed, the processes go on; to end them:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="bash fac_jax/launch/tpu_vm/worker.sh stop"
set -uo pipefail

say() { echo "run.sh: $*" >&2; }

[ $# -ge 3 ] || { echo "usage: bash launch/tpu_vm/run.sh NAME ZONE VERB CONFIG [flags of fac]" >&2; exit 2; }
name="$1" zone="$2"
shift 2
restarts="${FAC_RESTARTS:-3}" grace="${FAC_GRACE_S:-180}" notice="${FAC_NOTICE_S:-20}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
worker="FAC_GRACE_S=$grace bash fac_jax/launch/tpu_vm/worker.sh"
on_all=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all)

tar -czf "$scratch/fac_jax.tar.gz" --exclude=__pycache__ -C "$root" pyproject.toml README.md fac_jax configs launch &&
  gcloud compute tpus tpu-vm scp "$scratch/fac_jax.tar.gz" "$name:fac_jax.tar.gz" --zone="$zone" --worker=all &&
  "${on_all[@]}" --command="mkdir -p fac_jax && tar -xzf fac_jax.tar.gz -C fac_jax && $worker install"
status=$?
[ "$status" -eq 0 ] || { say "copying or installing failed with exit status $status"; exit "$status"; }

# One start on all hosts. The workers' last lines go to $scratch/ends in the order in which they ended: gcloud itself
# returns the status of the first worker by number, which need not be the first that failed.
start() {
  : > "$scratch/ends"
  echo 255 > "$scratch/status" # if gcloud never returns
  { "${on_all[@]}" --command="$1" & echo $! > "$scratch/gcloud"; wait $!; echo $? > "$scratch/status"; } 2>&1 |
    while IFS= read -r line; do
      printf '%s\n' "$line"
      case "$line" in "worker "*" ended with exit status "*) printf '%s\n' "$line" >> "$scratch/ends" ;; esac
    done
}

# Whether `start` has ended, now or within so many seconds.
ended_within() {
  local second
  for ((second = 0; second <= $1; second++)); do
    kill -0 "$run" 2>/dev/null || return 0
    [ "$second" -eq "$1" ] || sleep 1
  done
  return 1
}

stop_all() {
  "${on_all[@]}" --command="$worker stop" > /dev/null 2>&1 &
  local stopper=$!
  # A host that cannot be reached keeps gcloud trying for minutes.
  ended_within $((grace + 120)) || kill "$stopper" "$(cat "$scratch/gcloud")" "$run" 2>/dev/null
}

told=""
trap 'told=143' TERM
trap 'told=130' INT

id="$(date +%Y%m%d-%H%M%S)-$$"
for ((restart = 0; ; restart++)); do
  so_far="restarted $restart of $restarts times"
  start "$worker start $id-$restart$(printf ' %q' "$@")" &
  run=$!
  until ended_within 1; do
    [ -z "$told" ] || { stop_all; break; }
    ! grep -qsv 'status 0$' "$scratch/ends" || { ended_within "$notice" || stop_all; break; }
  done
  while kill -0 "$run" 2>/dev/null; do wait "$run"; done # a signal to this script interrupts wait
  status="$(cat "$scratch/status")"
  end="gcloud ended with exit status $status"
  if first="$(grep -m 1 -v 'status 0$' "$scratch/ends")"; then
    status="${first##* status }" status="${status%%:*}" end="$first"
  fi
  case "$status" in
    0) say "all processes are done; $so_far"; exit 0 ;;
    1 | 2 | 130) say "$end, which a restart does not mend; $so_far"; exit "$status" ;;
  esac
  [ -z "$told" ] || { say "told to stop; $end; $so_far"; exit "$told"; }
  [ "$restart" -lt "$restarts" ] || { say "$end; given up, $so_far"; exit "$status"; }
  say "$end; restarting all processes ($((restart + 1)) of $restarts)"
done
