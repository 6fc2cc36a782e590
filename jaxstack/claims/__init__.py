"""One executable experiment a method: what its paper claims, at small and at full scale."""

from jaxstack.core.registry import Registry

CLAIMS = Registry(
    "claim",
    {
        "hypermarl": "jaxstack.claims.hypermarl:claim",
        "kalman-linear-attention": "jaxstack.claims.kalman_linear_attention:claim",
    },
)
"""Method -> its `Claim`; `jaxstack reproduce METHOD` runs it."""
