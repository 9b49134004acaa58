"""Faults put into pipelines of real stages, and which detectors see them."""
