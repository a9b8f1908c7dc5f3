"""Side by side with other engines: same weights, prompts, threads and machine, interleaved in one run.

phases.py   what is timed, the rows that come of it, and the ratios to the best peer
worker.py   a peer's process, driven over pipes
workers/    what runs inside such a process, one file a peer
peers.py    which peers there are, how they are installed, in which formats they run
run.py      the benchmark: correctness first, then rounds
"""
