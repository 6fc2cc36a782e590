"""Flax modules and parameter functions shared by several methods."""
