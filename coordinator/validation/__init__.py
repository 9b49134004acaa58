"""Whether what a mesh delivered is what one process computes; and if not, where it went wrong.

Pure: evidence in, scores out. The evidence is gathered by ``services.validate``, and the reference
that it is held against is computed by ``stage_worker.reference``.
"""
