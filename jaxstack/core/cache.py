"""JAX's persistent compilation cache: on for every run, one switch to turn it off.

JAXSTACK_CACHE=off disables it, JAXSTACK_CACHE=/some/dir moves it; a cache directory that the user gave to JAX is kept.
"""

import os
from pathlib import Path


def default_dir() -> Path:
    """$XDG_CACHE_HOME/jaxstack/xla, usually ~/.cache/jaxstack/xla."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "jaxstack" / "xla"


def enable() -> Path | None:
    """Turn the cache on; returns its directory, None when it is off or cannot be written."""
    import jax

    choice = os.environ.get("JAXSTACK_CACHE", "")
    if choice == "off":
        return None
    own = jax.config.values["jax_compilation_cache_dir"]
    if own:
        return Path(own)
    path = Path(choice) if choice else default_dir()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return path
