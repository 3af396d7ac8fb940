"""Measurements of this engine and its peers under one driver. See README.md in this folder."""
