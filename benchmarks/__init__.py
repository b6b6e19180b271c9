"""What measures speed, memory and scale: each module runs with `python -m benchmarks.NAME`; the library imports none."""
