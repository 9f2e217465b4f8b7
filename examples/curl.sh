#!/usr/bin/env bash
# Everything from a shell, without any client: the server describes itself by reflection, so buf needs no .proto.
#
#   examples/curl.sh 127.0.0.1:8470 out/
set -euo pipefail
address=${1:?usage: curl.sh ADDRESS OUT}
out=${2:?usage: curl.sh ADDRESS OUT}
mkdir -p "$out"

# gRPC without TLS is HTTP/2 without negotiation. With TLS: https:// instead of --http2-prior-knowledge, and for a
# server with tokens -H 'authorization: Bearer TOKEN'.
call() { buf curl --protocol grpc --http2-prior-knowledge --reflect "$@"; }

# What can be called. `buf curl` describes no messages; the .proto files in protos/ do, field by field.
call --list-services "http://$address"
call --list-methods "http://$address"

# Is it ready? As Kubernetes asks, and as KServe and Triton do.
call -d '{}' "http://$address/grpc.health.v1.Health/Check"
call -d '{}' "http://$address/inference.GRPCInferenceService/ServerReady"

# Which models it has; GetModel describes one of them, here the only one: its card, identity and limits.
call -d '{}' "http://$address/balancedvae.sampling.v1.SamplingService/ListModels"
call -d '{}' "http://$address/balancedvae.sampling.v1.SamplingService/GetModel"

# Sample 100 of seed 7 as a PNG. In JSON 64-bit numbers are text, or they would lose digits beyond 2^53, and bytes are
# base64.
call -d '{"range": {"seed": "7", "start": "100", "count": "1", "encoding": "ENCODING_PNG"}}' \
  "http://$address/balancedvae.sampling.v1.SamplingService/Sample" |
  python3 -c 'import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["chunk"]["files"][0]))' \
    > "$out/sample.png"
