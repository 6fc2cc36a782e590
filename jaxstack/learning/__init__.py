"""Methods of learning: a file per method."""
