"""Cohort, vmapped local training, chain of update transforms, server step."""
