#!/usr/bin/env bash
# What run.sh has done on every host of a TPU slice, where the project lies:
#   bash launch/tpu_vm/worker.sh install
#   bash launch/tpu_vm/worker.sh start ID VERB CONFIG [flags of fac]
#   bash launch/tpu_vm/worker.sh stop        SIGTERM, so that fac saves; after FAC_GRACE_S (180 seconds) SIGKILL
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
grace="${FAC_GRACE_S:-180}"
state=".worker"

# Ends what an earlier start left running, for it holds the TPU.
stop() {
  local id
  id="$(cat "$state/pid" 2>/dev/null)" || return 0
  runs() { grep -qs mesh.coordinator "/proc/$id/cmdline"; } # the number may belong to another program by now
  runs && kill -TERM "$id" # it is timeout, which passes the signal on and kills after the grace
  for ((tenth = 0; tenth < 10 * (grace + 10); tenth++)); do
    runs || { rm -f "$state/pid"; return 0; }
    sleep 0.1
  done
  kill -KILL "$id"
}

case "${1:-}" in
  install)
    # The images of TPU VMs bring Python 3.10.
    if [ -z "${PYTHON:-}" ] && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python3 -m pip install --quiet --user uv && python3 -m uv python install --quiet 3.12 || exit 1
      PYTHON="$(python3 -m uv python find 3.12)"
      export PYTHON
    fi
    set -e
    source launch/install.sh
    fac_install ""
    ;;
  start)
    id="$2"
    shift 2
    worker="$(hostname)"
    mkdir -p "$state"
    # gcloud calls again what it called when a connection breaks; but a process cannot come back into its gang.
    if ! mkdir "$state/started-$id" 2>/dev/null; then
      echo "worker $worker ended with exit status 71: its connection was lost" >&2
      exit 71
    fi
    stop
    export PYTHONUNBUFFERED=1
    timeout --foreground --kill-after="$grace" 0 .venv/bin/fac "$@" --mesh.coordinator auto \
      > >(sed -u "s/^/[${worker##*-}] /") 2>&1 &
    echo $! > "$state/pid"
    wait $!
    status=$?
    rm -f "$state/pid"
    wait # for sed, so that the last words come before this line
    echo "worker $worker ended with exit status $status" >&2 # run.sh waits for it
    exit "$status"
    ;;
  stop) stop ;;
  *)
    echo "usage: worker.sh install | start ID VERB CONFIG [flags of fac] | stop" >&2
    exit 2
    ;;
esac
