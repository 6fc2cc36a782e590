"""Methods of optimisation: a file per method."""
