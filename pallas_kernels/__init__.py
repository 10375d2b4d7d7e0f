"""Per-shard kernel ops: plain functions of arrays that know no mesh, run by `sharding.local`."""
