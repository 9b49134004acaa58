"""The seeded simulator: the real decisions and the real hop machines, on virtual time, under fire.

plan       what a seed stands for          trouble, shots   faults of messages; of everything else
virtual    time and processes              network          connections that may be broken
link, endpoint, seats, worker, shell       the shell around the pure code, in memory
watch, clients, rest                       the referee: what must hold, judged from outside
world      one run                         campaign         many runs, counted
planted    bugs that the referee must find
"""
