"""A request's id: 16 bytes inside, a UUID's text for everybody else."""

from __future__ import annotations

import uuid

from stagemesh.errors import InvalidRequest


def request_key(text: str) -> bytes:
    """A request id (UUID as text) as its 16 bytes. Raises InvalidRequest."""
    try:
        return uuid.UUID(text).bytes
    except ValueError:
        raise InvalidRequest(
            "request_id is not a UUID", field="request_id", value=text[:64]
        ) from None


def show_id(request: bytes) -> str:
    """16 bytes as a UUID's text."""
    text = request.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
