#!/usr/bin/env bash
# Writes gen/: Go code from protos/, made by the generators that go.mod pins. Needs `make setup-dev`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=../../.venv/bin/python
imported=$("$python" -c 'import google.rpc, pathlib; print(pathlib.Path(google.rpc.__path__[0]).parents[1])')
go build -o bin/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
protos=(frame token generation_service)
options=()
for name in "${protos[@]}"; do
  for plugin in go go-grpc; do
    options+=("--${plugin}_opt=Mstagemesh/v1/$name.proto=stagemesh.example/client/gen/stagemesh/v1")
  done
done
mkdir -p gen
"$python" -m grpc_tools.protoc -I ../../protos -I "$imported" \
  --plugin=bin/protoc-gen-go --plugin=bin/protoc-gen-go-grpc \
  --go_out=gen --go_opt=paths=source_relative --go-grpc_out=gen --go-grpc_opt=paths=source_relative \
  "${options[@]}" $(printf "stagemesh/v1/%s.proto " "${protos[@]}")
