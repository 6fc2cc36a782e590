"""Measures of behaviour and learning: plain functions of arrays."""
