"""Methods for images: a file per method."""
