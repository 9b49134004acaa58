"""Decides: order, epochs, barriers, detection, recovery. No I/O, clock or randomness except where
the module docstring says *shell* (``backoff``, ``driver``, ``journal``)."""
