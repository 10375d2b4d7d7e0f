"""Runnable recipes (train, decode, convert, plan, bench) and the data layers they share."""
