"""Distillation: what a large recommender has learned, taught to one that a device can hold."""
