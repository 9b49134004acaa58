"""Generated from protos/stagemesh/v1 by `make protos`. Never edited."""
