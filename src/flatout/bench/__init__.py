"""Side by side with other engines: same weights, prompts, threads and machine, interleaved in one run.

phases.py   what is timed, the rows that come of it, and the ratios to the best peer
worker.py   a peer's process, driven over pipes
workers/    what runs inside such a process, one file a peer
peers.py    which peers there are, and in which formats they run
install.py  their environments; models.py the files that they load
own.py      our own models beside them
starts.py   fresh processes until their first token; turns.py rounds of loaded models
run.py      the benchmark; record.py its result
"""
