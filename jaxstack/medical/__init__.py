"""Measures of medical images, and phantoms with exact truth to try them on. Not a medical device."""
