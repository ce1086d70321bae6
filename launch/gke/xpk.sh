#!/usr/bin/env bash
# A run of fac on a cluster that xpk made (instead of submit.py):
#   CLUSTER=mine IMAGE=IMAGE bash launch/gke/xpk.sh NAME v5litepod-256 train configs/mine.yaml --run.dir /data/runs/wide
# SLICES (1), FAC_RESTARTS (3) and FAC_GRACE_S (180) may be set too; the project and zone are gcloud's. The image is what
# launch/gke/Dockerfile builds; storage that all hosts share comes from `xpk storage attach --auto-mount=true`.
# JAX finds its place by what GKE sets in the pods. xpk restarts all pods after 42 and 127 to 255 (a kill, or SIGTERM after
# a save) and here after 70 and 71 (crashed, hung), but not after 1 and 2, which mean that a person must mend something.
set -euo pipefail

if [ $# -lt 3 ] || [ -z "${CLUSTER:-}" ] || [ -z "${IMAGE:-}" ]; then
  echo "usage: CLUSTER=NAME IMAGE=IMAGE bash launch/gke/xpk.sh NAME TPU_TYPE VERB CONFIG [flags of fac]" >&2
  exit 2
fi
name="$1" type="$2"
shift 2
# exec: xpk sends SIGTERM to the shell that it wraps around the command, which then is fac itself.
exec xpk workload create --cluster "$CLUSTER" --workload "$name" --tpu-type "$type" --num-slices "${SLICES:-1}" \
  --docker-image "$IMAGE" --max-restarts "${FAC_RESTARTS:-3}" --restart-on-exit-codes 70,71 \
  --termination-grace-period-seconds "${FAC_GRACE_S:-180}" \
  --command "exec fac$(printf ' %q' "$@") --mesh.coordinator auto"
