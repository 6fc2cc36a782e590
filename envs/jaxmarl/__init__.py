"""JaxMARL 0.2 (Rutherford et al., 2024) behind our protocol: `jaxmarl/<id>`.

`adapter` holds what all families share; each family's file has its ids, its `Family` (what the library does not say by
itself) and its picture, `<family>_fast` its methods in a form that runs faster.
"""

from jaxstack.envs.jaxmarl.adapter import FAMILIES, IDS, JaxMARL, library, make

__all__ = ["FAMILIES", "IDS", "JaxMARL", "library", "make"]
