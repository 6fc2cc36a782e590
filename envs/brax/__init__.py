"""brax 0.14 environments (Freeman et al., 2021) behind our protocol: `brax/<id>`."""

from jaxstack.envs.brax.adapter import IDS, Brax, make

__all__ = ["IDS", "Brax", "make"]
