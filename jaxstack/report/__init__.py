"""Statistics over runs and units, and figures."""
