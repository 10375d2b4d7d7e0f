"""Decoding: the generate loop, acceptance rules, samplers, stop strings and drafters."""
