"""Measures what clients' messages reveal: attacks, priors, controls, report."""
