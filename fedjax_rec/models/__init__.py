"""Recommenders as pure functions of one client, and centralised references."""
