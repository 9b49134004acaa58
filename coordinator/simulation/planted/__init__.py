"""Bugs on purpose: would the referee notice if a guard were missing?

A planted bug replaces a few methods of the code under test while a run lasts, and puts them back.
The product knows nothing of it. Guards cover for each other: a bug whose guard is backed by another
one is planted together with it (a *pair*), because alone it changes nothing that anybody could see,
and saying so is what the pair is for.

bug        what a planted bug is            hops        frames, and the answers to them
stages     caches, sampling, fences         routes      barriers, fences, stalls, losses
requests   tokens, recoveries, ends         restarts    what outlives the coordinator
catalogue  all of them
"""
