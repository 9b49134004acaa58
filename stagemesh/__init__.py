"""The mesh's shared language: what a frame, a token, a span and an error are.

Pure: standard library (and the CRC32C package) only. Nothing in this room performs I/O, reads a
clock or draws a random number, so every rule in it can be tested exhaustively and simulated.
"""

__version__ = "0.1.0"
PROTOCOL_VERSION = 1
"""Version of the hop protocol. Stages of one route must agree on it exactly."""
