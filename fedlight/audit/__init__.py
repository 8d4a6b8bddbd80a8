"""Measuring what clients' messages give away: attacks, priors, controls, report."""
