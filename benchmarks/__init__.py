"""Measurements of this library against its peers; see README.md for the method."""
