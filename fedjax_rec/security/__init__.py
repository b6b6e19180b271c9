"""Secure sums, encrypted sums and robust aggregation: what the server may see, and what one client may do to it."""
