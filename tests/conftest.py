"""Strictness for every test, and the folder of real data sets."""

import gc
import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


MAPS = Path("/proc/self/maps")
MAX_MAPS = 8_000  # Linux allows a process 65,530


@pytest.fixture(scope="module", autouse=True)
def _room_for_compiled_programs():
    """Forgets compiled programs now and then: each takes memory maps, and a process that runs out of them aborts."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder named by FEDJAX_REC_DATA; tests that need it skip, and are counted, without it."""
    folder = os.environ.get("FEDJAX_REC_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set FEDJAX_REC_DATA to a folder with ml-100k/, ml-1m/ ... to run the tests on real data")
    return Path(folder)
