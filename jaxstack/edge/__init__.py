"""Training on devices at the edge: a file per method."""
