"""The shell: gRPC services, processes, telemetry, settings and the command line.

Where protobuf meets the project's own types, and the only room that may import gRPC. Decisions are
made in `coordinator`, tensors in `stage_worker`; this room carries both over wires and into
processes.
"""
