"""Benchmarks of a running mesh against bare mlx-lm on the same machine.

Two rules make a figure here worth reading. The baseline is mlx-lm itself, in one process, with the
same weights in the same dtype, the same BLAS and as many threads as our stages have together. And A
and B take turns in one run (A B A B …), so that whatever else the machine does hits both: the ratio
is the median of the ratios of neighbouring turns, and its spread is reported beside it. Absolute
figures belong to the machine they were taken on, which every report describes.
"""
