"""The same round in other frameworks: each program runs inside its own virtual environment and prints JSON lines."""
