"""Benchmarks are run by hand (`make bench`): pytest neither collects nor imports them."""

collect_ignore_glob = ["*.py"]
