"""Tests; the folders mirror the packages. Not installed."""
