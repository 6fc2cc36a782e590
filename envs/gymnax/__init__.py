"""gymnax 1.0 (Lange, 2022) behind our protocol: `gymnax/<id>`."""

from jaxstack.envs.gymnax.adapter import IDS, Gymnax, make

__all__ = ["IDS", "Gymnax", "make"]
