"""Launchers. They run from a checkout."""
