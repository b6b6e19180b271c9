"""Attacks on what a run releases: how much of the training data it gives away, measured."""
