#!/usr/bin/env bash
# A deployment in small: an S3 server (SeaweedFS), a Ray of two nodes that asks for a token, and Prometheus where it is
# installed, all on loopback and below one temporary folder. A sample archive is scored by a submitted job, as it would
# be on a cluster at a distance. What was started is ended by its process id.
#
#     deploy/local/rehearse.sh [--stay]     --stay: leave it up, to look around, until Ctrl-C
#
# PHOTOGRAPHS (2) and MODEL (lite) may be set. The commands come from .venv, or else from the PATH.

set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
export PATH="$root/.venv/bin:$PATH"
folder=$(mktemp -d "${TMPDIR:-/tmp}/ma-rehearsal-XXXXXX")
export TMPDIR=$folder
started=()

main() {
  read -r s3 master volume filer gcs dashboard prometheus <<<"$(free_ports 7)"
  endpoint=http://127.0.0.1:$s3
  cluster=http://127.0.0.1:$dashboard
  be_the_user
  start_store
  start_ray
  start_prometheus
  rehearse
  if [ "${1:-}" = --stay ]; then stay; fi
}

# Keys and token are made for this rehearsal; what is started below inherits them.
be_the_user() {
  export AWS_ENDPOINT_URL=$endpoint AWS_DEFAULT_REGION=us-east-1
  AWS_ACCESS_KEY_ID=$(secret) AWS_SECRET_ACCESS_KEY=$(secret) RAY_AUTH_TOKEN=$(secret)
  export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
  unset RAY_ADDRESS RAY_API_SERVER_ADDRESS
}

start_store() {
  mkdir "$folder/store"
  printf '{"identities": [{"name": "rehearsal", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": %s}]}' \
    "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" '["Admin", "Read", "Write", "List", "Tagging"]' >"$folder/s3.json"
  start store weed -logdir="$folder" server -dir="$folder/store" -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.telemetry=false \
    -master.port="$master" -volume.port="$volume" -filer.port="$filer" -volume.max=50 -master.volumeSizeLimitMB=64 \
    -s3 -s3.port="$s3" -s3.config="$folder/s3.json" -s3.port.iceberg=0 -s3.port.lance=0
  await store python -c 'import boto3; boto3.client("s3").create_bucket(Bucket="rehearsal")'
}

start_ray() {
  local node=(--block --node-ip-address=127.0.0.1 --num-cpus=2 --object-store-memory=200000000)
  start head ray start --head "${node[@]}" --port="$gcs" --temp-dir="$folder/ray" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --dashboard-agent-listen-port=0
  await head ray job list --address "$cluster"
  start node ray start --address="127.0.0.1:$gcs" "${node[@]}" --dashboard-agent-listen-port=0
  await node grep -q 'Ray runtime started' "$folder/node.log"
}

start_prometheus() {
  if ! command -v prometheus >/dev/null; then
    echo "no Prometheus on the PATH: the rehearsal goes without"
    return
  fi
  cp -r "$root/deploy/prometheus" "$folder/prometheus"
  sed -i.bak "s|/tmp/ray/|$folder/ray/|" "$folder/prometheus/prometheus.yml"
  start prometheus prometheus --config.file="$folder/prometheus/prometheus.yml" \
    --storage.tsdb.path="$folder/prometheus/data" --web.listen-address="127.0.0.1:$prometheus"
}

rehearse() {
  local archive="s3://rehearsal/archive" results="s3://rehearsal/results"
  ma-cluster sample "$archive" --images "${PHOTOGRAPHS:-2}"
  ma-cluster submit --address "$cluster" score_archive "$archive/A. Segmentation/1. Original Images" "$results" \
    --replicas 2 --model "${MODEL:-lite}"
  ma-cluster status "$results" --truth "$archive"
  if command -v prometheus >/dev/null; then
    await prometheus ask 'count(up{job="ray"} == 1)' ""
    ask 'count(up{job="ray"} == 1)' "exporters that Prometheus reads:"
    ask 'sum by (status) (ray_ma_images_total)' "photographs it has counted:" || true # a short run may end unread
  fi
}

# ask QUERY TEXT: what Prometheus answers, after the text; status 1 where it has nothing
ask() {
  python - "$prometheus" "$@" <<'PYTHON'
import json, sys, urllib.parse, urllib.request

port, query, text = sys.argv[1:]
url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(query)}"
with urllib.request.urlopen(url, timeout=10) as answer:
    found = json.load(answer)["data"]["result"]
for series in found:
    print(text, f"{float(series['value'][1]):.0f}", *series["metric"].values())
sys.exit(not found)
PYTHON
}

stay() {
  printf '%s\n' "" "S3          $endpoint" "dashboard   $cluster" "Prometheus  http://127.0.0.1:$prometheus" \
    "token       $RAY_AUTH_TOKEN" "Ctrl-C ends it all."
  sleep infinity
}

# start NAME COMMAND...: in the background, its lines in NAME.log
start() {
  local name=$1
  shift
  "$@" >"$folder/$name.log" 2>&1 &
  started+=($!)
}

# await NAME COMMAND...: until the command succeeds, for two minutes; NAME.log tells why it did not
await() {
  local name=$1
  shift
  for _ in $(seq 120); do
    if "$@" >"$folder/await.log" 2>&1; then
      return
    fi
    sleep 1
  done
  echo "$name did not come up:" >&2
  tail -n 20 "$folder/$name.log" >&2
  return 1
}

end() {
  local number
  for ((number = ${#started[@]} - 1; number >= 0; number--)); do
    # the store comes first: asked kindly, it takes a minute
    kill -"$([ "$number" -gt 0 ] && echo TERM || echo KILL)" "${started[number]}" 2>/dev/null || true
    wait "${started[number]}" 2>/dev/null || true
  done
  rm -rf "$folder"
}

secret() { python -c 'import secrets; print(secrets.token_hex(32))'; }

# SeaweedFS takes for gRPC the port 10,000 above; Ray's own begin at 10,002
free_ports() {
  python - "$1" <<'PYTHON'
import random, socket, sys

def free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0

ports = (port for port in random.sample(range(8100, 9900), 1800) if free(port) and free(port + 10_000))
print(*(next(ports) for _ in range(int(sys.argv[1]))))
PYTHON
}

trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
main "$@"
