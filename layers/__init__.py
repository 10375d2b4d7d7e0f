"""Sharding-annotated layers that all model families share."""
