"""What measures speed, memory and scale: run as `python -m benchmarks.NAME`; the library imports none of it."""
