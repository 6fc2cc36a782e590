"""One executable experiment per method: what its paper claims, at small and at full scale."""

from jaxstack.methods import CLAIMS

__all__ = ["CLAIMS"]
