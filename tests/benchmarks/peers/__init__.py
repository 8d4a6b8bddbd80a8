"""One script a system: it runs rounds of B1 or B2 in a process of its own and prints one line of JSON a process.

`side_by_side.py` starts them. By hand, with a job that it left (``--keep``):

    PYTHONPATH=tests/benchmarks .bench-env/pfl/bin/python -m peers.pfl --job job.pt --rounds 5 --warm 2
"""
