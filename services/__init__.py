"""Speaks: gRPC, files, signals, the terminal. The shell around the pure rooms, one file per service."""
