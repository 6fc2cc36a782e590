"""Sources of batches and data sets."""
