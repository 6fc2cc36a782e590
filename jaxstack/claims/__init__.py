"""One executable experiment a method: what its paper claims, at small and at full scale."""
