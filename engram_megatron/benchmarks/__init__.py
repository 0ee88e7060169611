"""Timings of the parts that a step waits for, each next to what it is compared with. Run by `launch/bench_*.py`.

Only the ratio of two numbers of one run is read: the times themselves say more about the machine than about the code.
"""
